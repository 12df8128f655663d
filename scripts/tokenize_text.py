#!/usr/bin/env python3
"""Text, JSONL and parquet to token shards (.bin) for train_gdn, llm.c and modded-nanogpt.

    python3 scripts/tokenize_text.py --out shards --vocab gpt2_files corpus/*.parquet
    ./train_gdn -i 'shards/train_*.bin' -j 'shards/val_*.bin'

Tokens are GPT-2's, by tiktoken. Every document begins with token 50256. A .jsonl or .jsonl.gz line and a .parquet row
is a document, taken from --column; any other file is text: one document, or several where <|endoftext|> stands
between them. A document goes to validation by its own hash, so that copies of it stay on one side. A shard ends with
the document that fills it.

The folder also gets vocab.txt, for text in and out (./train_gdn -load run_001 -gen 200 -prompt Once -vocab shards/vocab.txt).
Stopped at any moment, the same command goes on after the last whole shard and writes the same bytes.

--vocab takes a folder with OpenAI's vocab.bpe and encoder.json or Hugging Face's merges.txt and vocab.json, or a
.tiktoken file (base64 and rank in each line). Without it tiktoken fetches GPT-2's files.
"""

# The name is not tokenize.py: that would take the place of the standard library's module of this name for all
# scripts in the folder.

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import itertools
import json
import os
import struct
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Iterator

from common import Error, Parser, import_package, run_main

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's
END_OF_TEXT = 50256
SEPARATOR = "<|endoftext|>"
BATCH_CHARACTERS = 1 << 20  # of text that goes to a process at a time
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
        ranks = read_tiktoken(path)
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


def vocabulary_text(ranks: Ranks) -> str:
    """What ./train_gdn -vocab reads (gdn/vocabulary.h): classes of characters, then each token in hexadecimal."""
    classes = {"letters": r"\p{L}", "numbers": r"\p{N}", "spaces": r"\s"}
    head = ["train_gdn vocabulary 1", *(f"{name} {ranges(pattern)}" for name, pattern in classes.items())]
    return "\n".join(head + [token.hex() for token in sorted(ranks, key=ranks.__getitem__)]) + "\n"


# ---- documents ---------------------------------------------------------------------------------------------


def text_documents(path: Path) -> Iterator[tuple[str, float]]:
    size, rest = max(1, path.stat().st_size), ""
    with path.open(encoding="utf-8", newline="") as file:
        read = 0
        while piece := file.read(1 << 24):
            read += len(piece.encode())
            *whole, rest = (rest + piece).split(SEPARATOR)
            yield from ((text, read / size) for text in whole)
    yield rest, 1.0


def jsonl_documents(path: Path, column: str) -> Iterator[tuple[str, float]]:
    size = max(1, path.stat().st_size)
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise Error(f"{path}: line {number}: expected a JSON object with a text '{column}'") from None
            yield text, raw.tell() / size


def parquet_documents(path: Path, column: str) -> Iterator[tuple[str, float]]:
    parquet = import_package("pyarrow.parquet")
    pyarrow = import_package("pyarrow")
    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise Error(f"{path}: has no column {column}; columns: {', '.join(file.schema_arrow.names)}")
        done, rows = 0, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                done += 1
                if not isinstance(text, str):
                    raise Error(f"{path}: row {done}: {column} is not text")
                yield text, done / rows
    except pyarrow.ArrowException as e:
        raise Error(f"{path}: not a parquet file ({str(e).splitlines()[0]})") from None


def documents(paths: list[Path], column: str) -> Iterator[tuple[str, float]]:
    """Every document that is not empty, and the share of all input's bytes up to its end."""
    sizes = [path.stat().st_size for path in paths]
    total, before = max(1, sum(sizes)), 0
    for path, size in zip(paths, sizes):
        if path.suffix == ".parquet":
            of_file = parquet_documents(path, column)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            of_file = jsonl_documents(path, column)
        else:
            of_file = text_documents(path)
        try:
            for text, share in of_file:
                if text:
                    yield text, (before + min(1.0, share) * size) / total
        except UnicodeDecodeError as e:
            raise Error(f"{path}: not UTF-8 text ({e.reason})") from None
        except (gzip.BadGzipFile, EOFError) as e:
            raise Error(f"{path}: damaged gzip file ({e})") from None
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

encoding = None  # of this process


def start_process(ranks: Ranks) -> None:
    global encoding
    import tiktoken

    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={SEPARATOR: END_OF_TEXT})


def encode(texts: list[str], validation: float) -> list[tuple[bool, bytes]]:
    """Of each document whether it is validation's, and its tokens as uint16."""
    rows = []
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        tokens = [END_OF_TEXT, *encoding.encode_ordinary(text)]
        rows.append((int.from_bytes(digest, "little") < validation * 2.0**64, struct.pack(f"<{len(tokens)}H", *tokens)))
    return rows


# ---- shards ------------------------------------------------------------------------------------------------


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

    def __init__(self, folder: Path, split: str, done: int, limit: int):
        self.folder, self.split, self.done, self.limit = folder, split, done, limit
        self.tokens = bytearray()

    def path(self) -> Path:
        return self.folder / f"{self.split}_{self.done:06d}.bin"

    def add(self, tokens: bytes) -> bool:
        """True when this document filled the shard."""
        self.tokens += tokens
        return len(self.tokens) // 2 >= self.limit

    def write(self) -> None:
        if self.tokens:
            header = struct.pack("<256i", 20240520, 1, len(self.tokens) // 2, *[0] * 253)
            write_whole(self.path(), header, bytes(self.tokens))

    def close(self) -> None:
        self.write()
        self.done += 1
        self.tokens.clear()

    def reopen(self, tokens: int) -> None:
        """Takes up a shard that was not full, of this many tokens."""
        if tokens:
            data = self.path().read_bytes() if self.path().exists() else b""
            if len(data) < 1024 + 2 * tokens:
                raise Error(f"{self.path()}: has {len(data)} bytes, expected {1024 + 2 * tokens}; delete {self.folder}")
            self.tokens += data[1024 : 1024 + 2 * tokens]


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
        bar = "#" * int(30 * share) + "-" * (30 - int(30 * share))
        rate = self.tokens / max(1e-9, now - self.start)
        line = f"[{bar}] {share:6.1%}  {self.documents:,} documents  {self.tokens:,} tokens  {rate:,.0f} tokens/s"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)


def tokenize(paths: list[Path], out: Path, ranks: Ranks, column: str, limit: int, validation: float, processes: int):
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest()
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
        if changed:
            raise Error(f"{out}: was begun with other {', '.join(changed)}; choose another --out, or delete it")
        if state["complete"]:
            print(f"{out}: complete already: {state['documents']} documents")
            return
        print(f"going on after {state['documents']} documents", file=sys.stderr)
    elif stale := next(out.glob("*.bin"), None):
        raise Error(f"{stale}: is there, but no {state_path.name}; choose another --out, or delete it")
    write_whole(out / "vocab.txt", vocabulary_text(ranks).encode())
    train, val = Shards(out, "train", state["train"], limit), Shards(out, "val", state["val"], limit)
    val.reopen(state["val_tokens"])
    progress, first = Progress(), state["documents"]

    def save(complete: bool) -> None:
        done = {"documents": first + progress.documents, "train": train.done, "val": val.done}
        state = {"settings": settings, **done, "val_tokens": len(val.tokens) // 2, "complete": complete}
        write_whole(state_path, (json.dumps(state, indent=1) + "\n").encode())

    save(False)

    def take(rows: list[tuple[bool, bytes]]) -> None:
        for is_validation, tokens in rows:
            shards = val if is_validation else train
            progress.documents += 1
            progress.tokens += len(tokens) // 2
            if shards.add(tokens):
                shards.close()
                if shards is train:
                    val.write()
                    save(False)

    source = itertools.islice(documents(paths, column), first, None)
    waiting: deque = deque()
    with ProcessPoolExecutor(processes, initializer=start_process, initargs=(ranks,)) as pool:
        for texts, share in batches(source):
            waiting.append((pool.submit(encode, texts, validation), share))
            if len(waiting) > 2 * processes:
                done, share = waiting.popleft()
                take(done.result())
                progress.show(share)
        for done, _ in waiting:
            take(done.result())
    if first + progress.documents == 0:
        raise Error(f"{paths[0]}: no documents")
    if train.tokens:
        train.close()
    if val.tokens:
        val.close()
    save(True)
    progress.show(1.0, last=True)
    print(f"wrote {train.done} training and {val.done} validation shards to {out}")


def main(argv: list[str]) -> int:
    p = Parser(prog="tokenize_text.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", nargs="+", type=Path, help=".parquet, .jsonl, .jsonl.gz or text files")
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for train_*.bin, val_*.bin and vocab.txt")
    p.add_argument("--vocab", type=Path, metavar="PATH", help="GPT-2's files [tiktoken fetches them]")
    p.add_argument("--column", default="text", metavar="NAME", help="of JSONL and parquet [text]")
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
    import_package("tiktoken")
    tokenize(a.input, a.out, read_vocabulary(a.vocab), a.column, a.shard_tokens, a.val, a.processes)
    return 0


if __name__ == "__main__":
    run_main(main)
