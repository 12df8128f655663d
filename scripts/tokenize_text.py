#!/usr/bin/env python3
"""Text, JSONL and parquet to token shards (.bin) for train_gdn, llm.c and modded-nanogpt.

    python3 scripts/tokenize_text.py --out shards --vocab gpt2_files corpus/*.parquet
    ./train_gdn -i 'shards/train_*.bin' -j 'shards/val_*.bin'

Tokens are GPT-2's, by tiktoken, or those of a tokenizer.json (--tokenizer; Hugging Face's tokenizers reads it; from 65,537
tokens on, shards have 32 bits a token, as llm.c's of Llama 3). Every document begins with the separator: token 50256, or
of a tokenizer.json the token that --separator names. A line of .jsonl or .ndjson, an object of .json
(one, a list, or one a line) and a row of .parquet is a document, taken from --column (meta.text: of an object in it);
any other file is text: one document, or several where <|endoftext|> stands between them. Each may be compressed (.gz,
.zst, .xz, .bz2). Rows that are null or empty are skipped and counted.
A document goes to validation by its own hash, so that copies of it stay on one side; where there are too few for that,
the end of the last ones does. A shard ends with the document that fills it.

The folder also gets vocab.txt, for text in and out (./train_gdn -load run_001 -gen 200 -prompt Once -vocab shards/vocab.txt).
Stopped at any moment, the same command goes on after the last whole shard and writes the same bytes.

--vocab takes a folder with OpenAI's vocab.bpe and encoder.json or Hugging Face's merges.txt and vocab.json, a
.tiktoken file (base64 and rank in each line), or a vocab.txt of this script. Without it tiktoken fetches GPT-2's files.
With --tokenizer the folder gets the tokenizer.json in place of vocab.txt, and the last line says what ./train_gdn needs:

    python3 scripts/tokenize_text.py --out shards --tokenizer tokenizer.json corpus/*.parquet
    ./train_gdn -i 'shards/train_*.bin' -j 'shards/val_*.bin' -vocab_size 32000 -separator 1
    ./train_gdn -load run_001 -gen 200 | python3 scripts/detokenize.py --tokenizer shards/tokenizer.json --ids -
"""

# The name is not tokenize.py: that would take the place of the standard library's module of this name for all
# scripts in the folder.

from __future__ import annotations

import argparse
import base64
import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from common import Error, Parser, die_with_parent, import_package, run_main

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's
END_OF_TEXT = 50256
SEPARATOR = "<|endoftext|>"
SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<bos>", "<s>", "<eos>", "</s>")  # in a tokenizer.json
BATCH_CHARACTERS = 1 << 20  # of text that goes to a process at a time
# What \\s of PATTERN matches, more of it in a row than tiktoken's matcher has stack for.
LONG_SPACE = re.compile("[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]{1000,}")
FIRST_LINE = b"train_gdn vocabulary 1"
PACKED = (".gz", ".zst", ".xz", ".bz2")
LEAST_VALIDATION = 4096  # tokens, where a document is cut for validation
Ranks = dict[bytes, int]


# ---- the vocabulary ----------------------------------------------------------------------------------------


def gpt2_bytes() -> dict[str, int]:
    """The characters that stand for bytes in GPT-2's files."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def read_merges(merges: Path, vocab: Path) -> Ranks:
    """From the merges' file; token ids are those of the vocabulary's."""
    to_byte = gpt2_bytes()
    try:
        ids: dict[str, int] = json.loads(vocab.read_text(encoding="utf-8"))
        lines = [line for line in merges.read_text(encoding="utf-8").split("\n") if not line.startswith("#version")]
        tokens = list(to_byte) + ["".join(line.split()) for line in lines if line]
        ranks = {bytes(to_byte[c] for c in token): ids[token] for token in tokens}
    except (ValueError, KeyError, AttributeError) as e:
        raise Error(f"{merges}, {vocab}: not GPT-2's format ({e!r})") from None
    merged = [ids[token] for token in tokens[256:]]
    if merged != sorted(merged):
        raise Error(f"{vocab}: token ids do not ascend in the order of {merges.name}")
    return ranks


def read_tiktoken(path: Path) -> Ranks:
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise Error(f"{path}: expected lines of base64 and a rank") from None


def read_vocabulary_text(path: Path) -> Ranks:
    """From what vocabulary_text writes."""
    lines = path.read_bytes().splitlines()[4:]
    try:
        return {bytes.fromhex(line.decode()): rank for rank, line in enumerate(lines)}
    except ValueError:
        raise Error(f"{path}: expected a token in hexadecimal in each line") from None


def begins_with(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(text)) == text


def read_vocabulary(path: Path | None) -> Ranks:
    if path is None:
        tiktoken = import_package("tiktoken")
        try:
            return dict(tiktoken.get_encoding("gpt2")._mergeable_ranks)
        except Exception as e:  # requests' errors of many kinds
            raise Error(f"tiktoken could not fetch GPT-2's files ({type(e).__name__}); give them with --vocab") from None
    if path.is_dir():
        for merges, vocab in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")):
            if (path / merges).exists() and (path / vocab).exists():
                ranks = read_merges(path / merges, path / vocab)
                break
        else:
            raise Error(f"{path}: expected vocab.bpe and encoder.json, or merges.txt and vocab.json, in it")
    elif path.exists():
        ranks = read_vocabulary_text(path) if begins_with(path, FIRST_LINE) else read_tiktoken(path)
    else:
        raise Error(f"{path}: no such file or folder")
    if sorted(ranks.values()) != list(range(END_OF_TEXT)):
        raise Error(f"{path}: has {len(ranks)} tokens, expected the {END_OF_TEXT} of GPT-2, numbered from 0")
    return ranks


def ranges(pattern: str) -> str:
    """Code points that tiktoken takes for this pattern, as first-last in hexadecimal, with commas."""
    tiktoken = import_package("tiktoken")
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={})
    characters = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    members = enumerate(map(ord, bytes(encoding.encode_ordinary(characters)).decode()))  # what does not match is left out
    runs = [[c for _, c in run] for _, run in itertools.groupby(members, lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]:x}-{run[-1]:x}" for run in runs)


def split_token(token: bytes, ranks: Ranks) -> list[bytes]:
    """The two tokens that a token is merged from: what merging its bytes gives with the tokens before it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs)
        if rank >= ranks[token]:
            raise Error(f"token {token.hex()} is not two tokens before it")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def vocabulary_text(ranks: Ranks) -> str:
    """What ./train_gdn -vocab reads (gdn/vocabulary.h): classes of characters, then each token in hexadecimal."""
    classes = {"letters": r"\p{L}", "numbers": r"\p{N}", "spaces": r"\s"}
    head = ["train_gdn vocabulary 1", *(f"{name} {ranges(pattern)}" for name, pattern in classes.items())]
    return "\n".join(head + [token.hex() for token in sorted(ranks, key=ranks.__getitem__)]) + "\n"


class Gpt2:
    """GPT-2's tokens, by tiktoken."""

    separator, size = END_OF_TEXT, END_OF_TEXT + 1

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.ranks.items())).encode()).hexdigest()

    def file(self) -> tuple[str, bytes]:
        """What a folder of shards gets, to have text in and out."""
        return "vocab.txt", vocabulary_text(self.ranks).encode()

    def start(self) -> None:
        """In each process."""
        make_encodings(self.ranks)

    def tokens_of(self, text: str) -> list[int]:
        return tokens_of(text)

    def advice(self) -> str:
        return ""


class TokenizerJson:
    """The tokens of a tokenizer.json. A document's text never gives a special token."""

    def __init__(self, path: Path, separator: str | None):
        self.path = path
        if not path.is_file():
            raise Error(f"{path}: {'is a folder, expected a tokenizer.json' if path.is_dir() else 'no such file'}")
        self.data = path.read_bytes()
        self.start()
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(ids.values(), default=-1) + 1
        special = sorted(t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special)
        names = [separator] if separator is not None else [name for name in SEPARATORS if name in ids][:1]
        if not names or names[0] not in ids:
            raise Error(f"{path}: has no token {separator or ', '.join(SEPARATORS)} to begin documents with; name one with "
                        f"--separator (its special tokens: {', '.join(special) or 'none'})")
        self.separator = ids[names[0]]

    def digest(self) -> str:
        return hashlib.sha256(self.data + str(self.separator).encode()).hexdigest()

    def file(self) -> tuple[str, bytes]:
        return "tokenizer.json", self.data

    def start(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the work here
        tokenizers = import_package("tokenizers")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(self.data.decode())
        except Exception as e:  # of its own kind
            raise Error(f"{self.path}: not a tokenizer.json ({str(e).splitlines()[0]})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}

    def tokens_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def advice(self) -> str:
        return f"\ntrain with -vocab_size {self.size} -separator {self.separator}"


# ---- documents ---------------------------------------------------------------------------------------------


class Skipped:
    """Rows that hold no text."""

    null = empty = 0


def unpacked_name(path: Path) -> str:
    return path.stem if path.suffix in PACKED else path.name


def open_unpacked(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".zst":
        return io.BufferedReader(import_package("pyarrow").CompressedInputStream(raw, "zstd"))
    if path.suffix in PACKED:
        return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[path.suffix](raw)
    return raw


def text_documents(path: Path) -> Iterator[tuple[str, float]]:
    size, rest = max(1, path.stat().st_size), ""
    with path.open("rb") as raw, open_unpacked(path, raw) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        while piece := text.read(1 << 24):
            *whole, rest = (rest + piece).split(SEPARATOR)
            yield from ((document, raw.tell() / size) for document in whole)
    yield rest, 1.0


def text_of(row: Any, column: str, where: str) -> str | None:
    """What the column of a row holds, text or null; a.b is b of the object a."""
    value, names = row, [column] if isinstance(row, dict) and column in row else column.split(".")
    for name in names:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise Error(f"{where}: expected a JSON object with a text '{column}'")
        if name not in value:
            raise Error(f"{where}: has no '{column}'; its keys: {', '.join(map(str, value)) or 'none'} (--column)")
        value = value[name]
    if value is not None and not isinstance(value, str):
        raise Error(f"{where}: '{column}' is not text")
    return value


def json_rows(path: Path, file: BinaryIO) -> Iterator[tuple[Any, str]]:
    """The rows of a file of JSON and where they are: one a line, or in a .json also one in all or a list."""
    first = True
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if not first or not unpacked_name(path).endswith(".json"):
                raise Error(f"{path}: line {number}: not JSON") from None
            try:
                row = json.loads(line + file.read())
            except ValueError as e:
                raise Error(f"{path}: not JSON ({e})") from None
        first = False
        if isinstance(row, list):
            yield from ((item, f"{path}: item {i}") for i, item in enumerate(row, 1))
        else:
            yield row, f"{path}: line {number}"


def json_documents(path: Path, column: str) -> Iterator[tuple[str | None, float]]:
    size = max(1, path.stat().st_size)
    with path.open("rb") as raw, open_unpacked(path, raw) as file:
        for row, where in json_rows(path, file):
            yield text_of(row, column, where), raw.tell() / size


def parquet_documents(path: Path, column: str) -> Iterator[tuple[str | None, float]]:
    parquet = import_package("pyarrow.parquet")
    pyarrow = import_package("pyarrow")
    try:
        file = parquet.ParquetFile(path)
        names = [file.schema.column(i).path for i in range(len(file.schema))]
        if column not in (*names, *file.schema_arrow.names):
            raise Error(f"{path}: has no column {column}; columns: {', '.join(names)}")
        done, rows = 0, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(1024, columns=[column]):
            for row in batch.to_pylist():
                done += 1
                yield text_of(row, column, f"{path}: row {done}"), done / rows
    except pyarrow.ArrowException as e:
        raise Error(f"{path}: not a parquet file ({str(e).splitlines()[0]})") from None


def documents(paths: list[Path], column: str, skipped: Skipped) -> Iterator[tuple[str, float]]:
    """Every document that is not empty, and the share of all input's bytes up to its end."""
    sizes = [path.stat().st_size for path in paths]
    total, before = max(1, sum(sizes)), 0
    for path, size in zip(paths, sizes):
        if path.suffix == ".parquet":
            of_file = parquet_documents(path, column)
        elif unpacked_name(path).endswith((".jsonl", ".ndjson", ".json")):
            of_file = json_documents(path, column)
        else:
            if begins_with(path, b"PAR1") or (path.suffix not in PACKED and begins_with(path, b"\x1f\x8b")):
                raise Error(f"{path}: is parquet or gzip by its first bytes, not by its name; rename it")
            of_file = text_documents(path)
        try:
            for text, share in of_file:
                if text:
                    yield text, (before + min(1.0, share) * size) / total
                elif of_file.__name__ != "text_documents":
                    skipped.null += text is None
                    skipped.empty += text is not None
        except UnicodeDecodeError as e:
            raise Error(f"{path}: not UTF-8 text ({e.reason})") from None
        except (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error) as e:
            raise Error(f"{path}: damaged {path.suffix} file ({e})") from None
        except OSError as e:
            if path.suffix not in PACKED or e.errno is not None:
                raise
            raise Error(f"{path}: damaged {path.suffix} file ({e})") from None
        before += size


def batches(source: Iterator[tuple[str, float]]) -> Iterator[tuple[list[str], float]]:
    texts, characters, share = [], 0, 0.0
    for text, share in source:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield texts, share
            texts, characters = [], 0
    if texts:
        yield texts, share


# ---- in the processes --------------------------------------------------------------------------------------

encoding = one_piece = tokenizer = None  # of this process


def start_process(chosen: Gpt2 | TokenizerJson, parent: int) -> None:
    global tokenizer
    die_with_parent()
    if os.getppid() != parent:  # it ended before this could be asked for
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    tokenizer = chosen
    tokenizer.start()


def make_encodings(ranks: Ranks) -> None:
    global encoding, one_piece
    import tiktoken

    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={SEPARATOR: END_OF_TEXT})
    one_piece = tiktoken.Encoding("piece", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})


def tokens_of(text: str) -> list[int]:
    """tiktoken's tokens, also of long runs of blanks, at which its matcher runs out of stack: PATTERN makes one piece of
    a run but for its last character, which begins the next piece, and of a run at the end."""
    tokens, at = [], 0
    for run in LONG_SPACE.finditer(text):
        end = run.end() if run.end() == len(text) else run.end() - 1
        tokens += encoding.encode_ordinary(text[at : run.start()])
        tokens += one_piece.encode_ordinary(text[run.start() : end])
        at = end
    return tokens + encoding.encode_ordinary(text[at:])


def encode(texts: list[str], validation: float) -> list[tuple[bool, bytes]]:
    """Of each document whether it is validation's, and its tokens as a shard has them."""
    rows = []
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        tokens = [tokenizer.separator, *tokenizer.tokens_of(text)]
        packed = struct.pack(f"<{len(tokens)}{'I' if token_bytes(tokenizer) == 4 else 'H'}", *tokens)
        rows.append((int.from_bytes(digest, "little") < validation * 2.0**64, packed))
    return rows


# ---- shards ------------------------------------------------------------------------------------------------


def token_bytes(of: Gpt2 | TokenizerJson) -> int:
    return 2 if of.size <= 1 << 16 else 4


def shard_header(tokens: int, width: int) -> bytes:
    """Of shards with `width` bytes a token (gdn/token_file.h)."""
    return struct.pack("<256i", *((20240520, 1) if width == 2 else (20240801, 7)), tokens, *[0] * 253)


def write_whole(path: Path, *parts: bytes) -> None:
    """The file is there with all its bytes, or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Shards:
    """Tokens of one split; `done` shards are full, the next one grows in memory."""

    def __init__(self, folder: Path, split: str, done: int, limit: int, width: int):
        self.folder, self.split, self.done, self.limit, self.width = folder, split, done, limit, width
        self.tokens = bytearray()

    def path(self) -> Path:
        return self.folder / f"{self.split}_{self.done:06d}.bin"

    def add(self, tokens: bytes) -> bool:
        """True when this document filled the shard."""
        self.tokens += tokens
        return self.count() >= self.limit

    def count(self) -> int:
        return len(self.tokens) // self.width

    def write(self) -> None:
        if self.tokens:
            write_whole(self.path(), shard_header(self.count(), self.width), bytes(self.tokens))

    def close(self) -> None:
        self.write()
        self.done += 1
        self.tokens.clear()

    def reopen(self, tokens: int) -> None:
        """Takes up a shard that was not full, of this many tokens."""
        if tokens:
            data = self.path().read_bytes() if self.path().exists() else b""
            size = 1024 + self.width * tokens
            if len(data) < size:
                raise Error(f"{self.path()}: has {len(data)} bytes, expected {size}; delete {self.folder}")
            self.tokens += data[1024:size]


class Progress:
    """A line on the terminal that is written over, or a line every half minute in a log."""

    def __init__(self) -> None:
        self.start = self.last = time.time()
        self.tokens = self.documents = 0

    def show(self, share: float, last: bool = False) -> None:
        terminal, now = sys.stderr.isatty(), time.time()
        if not last and now - self.last < (0.2 if terminal else 30):
            return
        self.last = now
        rate = self.tokens / max(1e-9, now - self.start)
        fields = [f"{share:6.1%}", f"{self.tokens:,} tokens", f"{rate:,.0f} tokens/s", f"{self.documents:,} documents"]
        line, width = "", shutil.get_terminal_size().columns - 1
        for field in fields:  # whole ones, as many as fit
            longer = f"{line}  {field}" if line else field
            if terminal and len(longer) > width:
                break
            line = longer
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)


def tokenize(paths: list[Path], out: Path, chosen: Gpt2 | TokenizerJson, column: str, limit: int, validation: float,
             processes: int):  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    vocabulary, width = chosen.digest(), token_bytes(chosen)
    settings = {"inputs": [[str(p), p.stat().st_size] for p in paths], "column": column, "shard_tokens": limit,
                "validation": validation, "vocabulary": vocabulary}  # fmt: skip
    state_path = out / "progress.json"
    state = {"settings": settings, "documents": 0, "train": 0, "val": 0, "val_tokens": 0, "complete": False}
    if state_path.exists():
        try:
            state = json.loads(state_path.read_text())
            changed = [key for key in settings if state["settings"][key] != settings[key]]
        except (ValueError, KeyError, TypeError):
            raise Error(f"{state_path}: damaged; delete {out} to begin anew") from None
        if changed and state["documents"] == state["train"] == state["val"] == 0:
            state |= {"settings": settings, "complete": False}  # nothing was written under the other ones
        elif changed:
            raise Error(f"{out}: was begun with other {', '.join(changed)}; choose another --out, or delete it")
        if state["complete"]:
            print(f"{out}: complete already: {state['documents']} documents")
            return
        if state["documents"]:
            print(f"going on after {state['documents']} documents", file=sys.stderr)
    elif stale := next(out.glob("*.bin"), None):
        raise Error(f"{stale}: is there, but no {state_path.name}; choose another --out, or delete it")
    name, data = chosen.file()
    write_whole(out / name, data)
    train, val = (Shards(out, split, state[split], limit, width) for split in ("train", "val"))
    val.reopen(state["val_tokens"])
    progress, first, skipped = Progress(), state["documents"], Skipped()

    def save(complete: bool, cut: int | None = None) -> None:
        done = {"documents": first + progress.documents, "train": train.done, "val": val.done}
        state = {"settings": settings, **done, "val_tokens": val.count(), "complete": complete}
        if cut is not None:
            state["cut"] = cut
        write_whole(state_path, (json.dumps(state, indent=1) + "\n").encode())

    if "cut" in state:  # killed while the last shard gave its end to validation
        shorten(out / f"train_{train.done - 1:06d}.bin", state["cut"], width)
        save(True)
        print(f"{out}: complete: {state['documents']} documents")
        return
    save(False)

    def take(rows: list[tuple[bool, bytes]]) -> None:
        for is_validation, tokens in rows:
            shards = val if is_validation else train
            progress.documents += 1
            progress.tokens += len(tokens) // width
            if shards.add(tokens):
                shards.close()
                if shards is train:
                    val.write()
                    save(False)

    source = itertools.islice(documents(paths, column, skipped), first, None)
    waiting: deque = deque()
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(processes, context, initializer=start_process, initargs=(chosen, os.getpid())) as pool:
        try:
            for texts, share in batches(source):
                waiting.append((pool.submit(encode, texts, validation), share))
                if len(waiting) > 2 * processes:
                    done, share = waiting.popleft()
                    take(done.result())
                    progress.show(share)
            for done, _ in waiting:
                take(done.result())
        except BrokenProcessPool:
            raise Error("a process ended by itself (out of memory?); the same command goes on, with fewer --processes") from None
        finally:  # also after Ctrl-C: what waits is not begun any more
            pool.shutdown(wait=False, cancel_futures=True)
    if first + progress.documents == 0:
        raise Error(f"{paths[0]}: no documents")
    if train.tokens:
        train.close()
    if val.tokens:
        val.close()
    said = ""
    if validation and not val.done:
        said = cut_validation(train, val, validation, save, chosen.separator)
    save(True)
    progress.show(1.0, last=True)
    print(f"wrote {train.done} training and {val.done} validation shards to {out}{said}{chosen.advice()}")
    if skipped.null or skipped.empty:
        print(f"skipped {skipped.null} null and {skipped.empty} empty rows")


def shorten(path: Path, tokens: int, width: int) -> None:
    """Leaves a shard its first tokens."""
    data = path.read_bytes()[: 1024 + width * tokens]
    write_whole(path, shard_header(tokens, width), data[1024:])


def cut_validation(train: Shards, val: Shards, validation: float, save, separator: int) -> str:
    """No document went to validation: it gets the end of the last training shard."""
    path = train.folder / f"train_{train.done - 1:06d}.bin"
    data = path.read_bytes()[1024:]
    width = train.width
    tokens = len(data) // width
    taken = min(max(int(tokens * validation), LEAST_VALIDATION), tokens // 10)
    if taken < 2:
        return " (too little text for validation)"
    val.tokens += separator.to_bytes(width, "little") + data[width * (tokens - taken) :]
    val.close()
    save(False, tokens - taken)
    shorten(path, tokens - taken, width)
    return f"; the last {taken:,} tokens are validation's, as no document's hash chose it"


def main(argv: list[str]) -> int:
    p = Parser(prog="tokenize_text.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", nargs="+", type=Path, help=".parquet, .jsonl, .ndjson, .json or text files, also .gz, .zst, .xz, .bz2")
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for train_*.bin, val_*.bin and vocab.txt")
    p.add_argument("--vocab", type=Path, metavar="PATH", help="GPT-2's files or vocab.txt [tiktoken fetches them]")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, in place of GPT-2's tokens")
    p.add_argument("--separator", metavar="TOKEN", help=f"with --tokenizer [the first there is of {', '.join(SEPARATORS)}]")
    p.add_argument("--column", default="text", metavar="NAME", help="of JSON and parquet [text]")
    p.add_argument("--val", type=float, default=0.005, metavar="X", help="share of documents for validation [0.005]")
    p.add_argument("--shard_tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard [100000000]")
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="[one for each core]")
    a = p.parse_args(argv)
    if not 0 <= a.val < 1:
        raise Error(f"--val {a.val}: expected a share from 0 to below 1")
    for name in ("shard_tokens", "processes"):
        if getattr(a, name) < 1:
            raise Error(f"--{name} {getattr(a, name)}: expected 1 or more")
    for path in a.input:
        if not path.is_file():
            raise Error(f"{path}: {'is a folder, expected files' if path.is_dir() else 'no such file'}")
    if a.tokenizer is not None:
        if a.vocab is not None:
            raise Error("--vocab and --tokenizer: expected one of them")
        chosen: Gpt2 | TokenizerJson = TokenizerJson(a.tokenizer, a.separator)
    else:
        if a.separator is not None:
            raise Error(f"--separator {a.separator}: is for --tokenizer; GPT-2's documents begin with {SEPARATOR}")
        import_package("tiktoken")
        chosen = Gpt2(read_vocabulary(a.vocab))
    tokenize(a.input, a.out, chosen, a.column, a.shard_tokens, a.val, a.processes)
    return 0


if __name__ == "__main__":
    run_main(main)
