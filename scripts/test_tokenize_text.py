"""Tests of tokenize_text.py and detokenize.py, with a small vocabulary; most are skipped where tiktoken is missing.

    python3 scripts/test_tokenize_text.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import importlib.util
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest
from pathlib import Path

from testing import HERE, TRAIN_GDN, InFolder, call, needs_tiktoken, needs_tokenizers, needs_train_gdn


def read_shard(path: Path) -> list[int]:
    """llm.c's format."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    tokens = struct.unpack(f"<{len(data) // 2 - 512}H", data[1024:])
    if header != (20240520, 1, len(tokens), *[0] * 253):
        raise AssertionError(f"{path}: header {header[:4]}, {len(tokens)} tokens")
    return list(tokens)


@needs_tiktoken
class Tokenizing(InFolder):
    """With a vocabulary of GPT-2's size: the bytes, then 50,000 of their pairs, the one of 'th' first."""

    def setUp(self) -> None:
        super().setUp()
        pairs = [bytes((a, b)) for a in range(256) for b in range(256) if bytes((a, b)) != b"th"]
        self.tokens = [bytes([b]) for b in range(256)] + [b"th"] + pairs[:49_999]
        lines = [base64.b64encode(t) + f" {i}".encode() for i, t in enumerate(self.tokens)]
        self.vocab = self.folder / "vocab.tiktoken"
        self.vocab.write_bytes(b"\n".join(lines) + b"\n")

    def tokenize(self, *arguments: object, out: str = "out", **environment: str) -> subprocess.CompletedProcess:
        words = ("--out", self.folder / out, "--vocab", self.vocab, "--processes", 2, *arguments)
        return call("tokenize_text.py", *words, **environment)

    def documents(self, *shards: str, out: str = "out") -> list[str]:
        """Texts of all documents of these shards, in order; each shard must begin with a document."""
        texts: list[bytes] = []
        for pattern in shards:
            for path in sorted((self.folder / out).glob(pattern)):
                tokens = read_shard(path)
                self.assertEqual(tokens[0], 50256)
                for token in tokens:
                    if token == 50256:
                        texts.append(b"")
                    else:
                        texts[-1] += self.tokens[token]
        return [text.decode() for text in texts]

    def jsonl(self, count: int, name: str = "a.jsonl") -> list[str]:
        texts = [f"document {i}: then\n  \u00e4 {'x' * (i % 7)} it's " * (1 + i % 5) for i in range(count)]
        (self.folder / name).write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
        return texts

    def test_text_jsonl_and_gzip(self) -> None:
        texts = self.jsonl(5)
        (self.folder / "b.txt").write_text("the first<|endoftext|>the \u4e2d second<|endoftext|>")
        with gzip.open(self.folder / "c.jsonl.gz", "wt") as f:
            f.write(json.dumps({"text": "zipped"}) + "\n")
        done = self.tokenize("--val", 0, *(self.folder / name for name in ("a.jsonl", "b.txt", "c.jsonl.gz")))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents("train_*"), [*texts, "the first", "the \u4e2d second", "zipped"])
        self.assertIn(256, read_shard(self.folder / "out" / "train_000000.bin"))  # 'th' was merged

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is missing")
    def test_every_kind_of_json_packed_or_not(self) -> None:
        import bz2
        import lzma

        import pyarrow

        def zstd(data: bytes) -> bytes:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            return sink.getvalue().to_pybytes()

        rows = [{"meta": {"text": t}, "id": i} for i, t in enumerate(("one", None, "two", ""))]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files = {
            "a.json": json.dumps(rows).encode(), "b.json": json.dumps(rows, indent=2).encode(), "c.json": lines,
            "d.ndjson": lines, "e.json.gz": gzip.compress(json.dumps(rows).encode()), "f.jsonl.zst": zstd(lines),
            "g.jsonl.xz": lzma.compress(lines), "h.ndjson.bz2": bz2.compress(lines), "i.json.zst": zstd(json.dumps(rows).encode()),
            "j.jsonl": b"\xef\xbb\xbf" + lines,
        }  # fmt: skip
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        done = self.tokenize("--val", 0, "--column", "meta.text", *(self.folder / name for name in files))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents("train_*"), ["one", "two"] * len(files))
        self.assertIn(f"skipped {len(files)} null and {len(files)} empty rows", done.stdout)
        (self.folder / "one.json").write_text(json.dumps({"meta": {"text": "alone"}}, indent=1))
        (self.folder / "text.zst").write_bytes(zstd("the \u4e2d<|endoftext|>second".encode()))
        words = ("--val", 0, "--column", "meta.text", self.folder / "one.json", self.folder / "text.zst")
        self.assertEqual(self.tokenize(*words, out="more").returncode, 0)
        self.assertEqual(self.documents("train_*", out="more"), ["alone", "the \u4e2d", "second"])
        for name, data, message in (
            ("x.jsonl", b'{"a": 1}\n', "line 1: has no 'text'; its keys: a (--column)"), ("x.jsonl", b"[1]\n", "item 1: expected a JSON object"),
            ("x.jsonl", b'{"text": 3}\n', "line 1: 'text' is not text"), ("x.jsonl", b'{"text": "a"}\n{"te', "line 2: not JSON"),
            ("x.json", b'{"text":\n', "x.json: not JSON"), ("x.jsonl.zst", b"no zstd", "x.jsonl.zst: damaged .zst"),
            ("x.jsonl.gz", b"no gzip", "x.jsonl.gz: damaged .gz"), ("x.txt.xz", b"no xz", "x.txt.xz: damaged .xz"),
            ("x.txt", gzip.compress(b"a"), "x.txt: is parquet or gzip by its first bytes"),
        ):  # fmt: skip
            (self.folder / name).write_bytes(data)
            self.assert_one_line_error(self.tokenize(self.folder / name, out="bad"), message)

    def test_a_document_of_a_million_blanks(self) -> None:
        texts = ["a" + " " * 1_000_000 + "b", "\n" * 200_000, " " * 5000 + "\u2003" * 3000 + "\n's", "\t" * 4000 + " x" + " " * 1001 + "!"]
        (self.folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        done = self.tokenize("--val", 0, self.folder / "a.jsonl")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents("train_*"), texts)
        # where tiktoken has stack enough its tokens are the same
        import tokenize_text

        ranks = {token: i for i, token in enumerate(self.tokens)}
        tokenize_text.make_encodings(ranks)
        for space in (" ", "\n", "\t \n", " \u2003", "\x1c ", "\u3000"):
            for before in ("", "a", "'", "1!"):
                for after in ("", "b", "'s", "7", "!", "\x1c", "\u4e2d"):
                    text = before + space * 1500 + after
                    self.assertEqual(tokenize_text.tokens_of(text), self.encode(text), (space, before, after))

    def test_one_document_still_gives_validation_data(self) -> None:
        text = " ".join(f"word {i} of it" for i in range(20_000))
        (self.folder / "a.txt").write_text(text)
        done = self.tokenize("--shard_tokens", 10_000, self.folder / "a.txt")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("1 training and 1 validation shards", done.stdout)
        train, val = (read_shard(self.folder / "out" / f"{split}_000000.bin") for split in ("train", "val"))
        self.assertEqual([*train, *val[1:]], [50256, *self.encode(text)])
        self.assertEqual((val[0], len(val)), (50256, 4097))
        # killed between writing the validation shard and cutting the training shard
        out = self.folder / "out"
        state = json.loads((out / "progress.json").read_text())
        (out / "progress.json").write_text(json.dumps(state | {"complete": False, "cut": len(train)}))
        whole = struct.pack("<256i", 20240520, 1, len(train) + 4096, *[0] * 253) + struct.pack(f"<{len(train) + 4096}H", *train, *val[1:])
        for data in (whole, (out / "train_000000.bin").read_bytes()):
            (out / "train_000000.bin").write_bytes(data)
            (out / "progress.json").write_text(json.dumps(state | {"complete": False, "cut": len(train)}))
            done = self.tokenize("--shard_tokens", 10_000, self.folder / "a.txt")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(read_shard(out / "train_000000.bin"), train)
        (self.folder / "short.txt").write_text("ab ab ab")
        self.assertIn("too little text for validation", self.tokenize(self.folder / "short.txt", out="short").stdout)

    def test_stopped_it_leaves_no_process(self) -> None:
        self.jsonl(30_000)
        for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            words = [sys.executable, HERE / "tokenize_text.py", "--out", self.folder / "out", "--vocab", self.vocab, "--processes", 2]
            command = [*map(str, words), *[str(self.folder / "a.jsonl")] * 40]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
            deadline = time.monotonic() + 60
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            self.assertEqual(len(workers), 2)
            time.sleep(0.3)
            os.kill(process.pid, how)
            said = process.communicate(timeout=60)[1]
            self.assertEqual(process.returncode, code, said)
            if how == signal.SIGINT:
                self.assertEqual(said.strip().splitlines()[-1], "tokenize_text.py: stopped")
                self.assertNotIn("Traceback", said)
            while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.assertFalse(any(Path(f"/proc/{worker}").exists() for worker in workers))

    def test_progress_fits_the_terminal(self) -> None:
        import tokenize_text

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for columns in (20, 40, 80):
            os.environ["COLUMNS"] = str(columns)
            said = Terminal()
            with contextlib.redirect_stderr(said):
                progress = tokenize_text.Progress()
                progress.tokens, progress.documents, progress.last = 123_456_789_012, 1_234_567, 0
                progress.show(0.5)
            line = said.getvalue().removeprefix("\r").removesuffix("\033[K")
            self.assertLess(len(line), columns)
            self.assertTrue(line.startswith(" 50.0%"), line)
        del os.environ["COLUMNS"]

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is missing")
    def test_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two", ""], "text": [1, 2, 3]}), path)
        self.assertEqual(self.tokenize("--val", 0, "--column", "body", path).returncode, 0)
        self.assertEqual(self.documents("train_*"), ["one", "two"])
        self.assert_one_line_error(self.tokenize(path, out="b"), "row 1: 'text' is not text")
        self.assert_one_line_error(self.tokenize("--column", "c", path, out="c"), "no column c; columns: body, text")
        # null rows are counted, a text in a struct is a column, and a wrong column is corrected in place
        rows = {"meta": [{"text": "in it", "n": 1}, None, {"text": None, "n": 2}, {"text": "", "n": 3}]}
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
        self.assert_one_line_error(self.tokenize("--column", "text", path, out="n"), "no column text; columns: meta.text, meta.n")
        self.assert_one_line_error(self.tokenize("--column", "meta", path, out="n"), "row 1: 'meta' is not text")
        done = self.tokenize("--column", "meta.text", path, out="n")
        self.assertIn("skipped 2 null and 1 empty rows", done.stdout, done.stderr)
        self.assertEqual(self.documents("train_*", out="n"), ["in it"])
        path.write_text("no parquet")
        self.assert_one_line_error(self.tokenize(path, out="d"), "not a parquet file")

    def test_split_is_by_document(self) -> None:
        texts = self.jsonl(400) + self.jsonl(400, "b.jsonl")
        done = self.tokenize("--val", 0.2, "--shard_tokens", 3000, self.folder / "a.jsonl", self.folder / "b.jsonl")
        self.assertEqual(done.returncode, 0, done.stderr)
        train, val = self.documents("train_*"), self.documents("val_*")
        self.assertEqual(sorted(train + val), sorted(texts))
        self.assertEqual(set(train) & set(val), set())
        self.assertTrue(80 < len(val) < 260, len(val))
        for path in (self.folder / "out").glob("train_*.bin"):
            self.assertLess(len(read_shard(path)), 3300)

    def test_killed_runs_go_on_to_the_same_bytes(self) -> None:
        self.jsonl(3000)
        words = ("--val", 0.1, "--shard_tokens", 5000, self.folder / "a.jsonl")
        self.assertEqual(self.tokenize(*words, out="whole").returncode, 0)
        shutil.copytree(self.folder / "whole", self.folder / "out")
        state = json.loads((self.folder / "out" / "progress.json").read_text())
        # as killed after the second training shard, with the third one half written
        whole, documents, tokens, val, full = self.documents("train_*", out="whole"), 0, 0, 0, 0
        trained = set(whole)
        for line in (self.folder / "a.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            documents += 1
            count = 1 + len(self.encode(text))
            if text not in trained:
                val += count
                continue
            tokens += count
            if tokens >= 5000:
                full, tokens = full + 1, 0
            if full == 2:
                break
        self.assertLess(val, 5000)
        state |= {"documents": documents, "train": 2, "val": 0, "val_tokens": val, "complete": False}
        (self.folder / "out" / "progress.json").write_text(json.dumps(state))
        (self.folder / "out" / "train_000002.bin.tmp").write_text("half")
        for path in (self.folder / "out").glob("train_*.bin"):
            if path.name > "train_000001.bin":
                path.unlink()
        done = self.tokenize(*words)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"going on after {documents} documents", done.stderr)
        for path in (self.folder / "whole").glob("*.bin"):
            self.assertEqual(path.read_bytes(), (self.folder / "out" / path.name).read_bytes(), path.name)
        self.assertIn("complete already", self.tokenize(*words).stdout)
        self.assert_one_line_error(self.tokenize(*words, "--shard_tokens", 9), "other shard_tokens")

    def encode(self, text: str) -> list[int]:
        import tiktoken

        sys.path.insert(0, str(HERE))
        from tokenize_text import PATTERN

        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text)

    def test_gpt2_files_give_the_same_vocabulary(self) -> None:
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = iter(range(256, 1000))
        letter = {b: chr(b) if b in shown else chr(next(hidden)) for b in range(256)}
        ids = {"".join(letter[b] for b in token): i for i, token in enumerate(self.tokens)}
        folder = self.folder / "files"
        folder.mkdir()
        (folder / "encoder.json").write_text(json.dumps(ids | {"<|endoftext|>": 50256}))
        merges = "\n".join(" ".join(letter[b] for b in token) for token in self.tokens[256:])
        (folder / "vocab.bpe").write_text("#version: 0.2\n" + merges + "\n")
        (self.folder / "a.txt").write_text("the thing")
        self.assertEqual(self.tokenize(self.folder / "a.txt", out="a").returncode, 0)
        self.vocab = folder
        self.assertEqual(self.tokenize(self.folder / "a.txt", out="b").returncode, 0)
        self.vocab = self.folder / "a" / "vocab.txt"  # its own output
        self.assertEqual(self.tokenize(self.folder / "a.txt", out="c").returncode, 0)
        a, b, c = ((self.folder / out / "vocab.txt").read_bytes() for out in "abc")
        self.assertEqual(a, b)
        self.assertEqual(a, c)

    @needs_train_gdn
    def test_vocabulary_turns_tokens_into_text(self) -> None:
        self.jsonl(50)
        self.assertEqual(self.tokenize("--val", 0, self.folder / "a.jsonl").returncode, 0)
        lines = (self.folder / "out" / "vocab.txt").read_text().splitlines()
        self.assertEqual(lines[0], "train_gdn vocabulary 1")
        self.assertTrue(lines[1].startswith("letters 41-5a,61-7a,aa-aa,b5-b5,"), lines[1])
        self.assertTrue(lines[2].startswith("numbers 30-39,b2-b3,"), lines[2])
        self.assertTrue(lines[3].startswith("spaces 9-d,20-20,85-85,a0-a0,"), lines[3])
        self.assertEqual([bytes.fromhex(line) for line in lines[4:]], self.tokens)

        def train_gdn(*words: object) -> str:
            words = (TRAIN_GDN, "-d", "cpu", "-seed", 1, *words)
            done = subprocess.run([*map(str, words)], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout.decode(errors="replace")

        shards, run = self.folder / "out" / "train_*.bin", self.folder / "run"
        train_gdn("-i", shards, "-w", 16, "-heads", 1, "-L", 1, "-T", 8, "-B", 1, "-n", 1, "-s", 0, "-v", 0, "-o", run)
        text = train_gdn("-load", run, "-gen", 9, "-prompt", "the th\u4e2d", "-vocab", self.folder / "out" / "vocab.txt")
        self.assertTrue(text.startswith("the th\u4e2d"), text)
        # the same by numbers: the prompt's tokens by tiktoken, and what follows
        prompt = [50256, *self.encode("the th\u4e2d")]
        numbers = [int(n) for n in train_gdn("-load", run, "-gen", 9, "-prompt", " ".join(map(str, prompt))).split()]
        self.assertEqual(numbers[: len(prompt)], prompt)
        known = [*self.tokens, b"<|endoftext|>"]
        self.assertEqual(text, b"".join(known[n] for n in numbers[1:]).decode(errors="replace") + "\n")

    def test_shards_back_to_text(self) -> None:
        texts = self.jsonl(40)
        self.assertEqual(self.tokenize("--val", 0, "--shard_tokens", 300, self.folder / "a.jsonl").returncode, 0)
        shards = sorted((self.folder / "out").glob("train_*.bin"))
        self.assertGreater(len(shards), 1)
        whole = "<|endoftext|>".join(texts)
        for vocab in (self.vocab, self.folder / "out" / "vocab.txt"):
            done = call("detokenize.py", "--vocab", vocab, *shards)
            self.assertEqual((done.returncode, done.stdout), (0, whole), done.stderr)
        # a part, by tokens, over the end of the first shard
        tokens = [token for path in shards for token in read_shard(path)]
        count, file = len(read_shard(shards[0])) + 5, self.folder / "part.txt"
        words = ("--tokens", count, "--separator", "\\n-\\n", "--vocab", self.vocab, "--out", file)
        done = call("detokenize.py", *words, *shards)
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        known = [*self.tokens, b"\n-\n"]
        self.assertEqual(file.read_bytes(), b"".join(known[token] for token in tokens[1:count]))
        # the text gives the shards again
        (self.folder / "whole.txt").write_text(whole)
        words = ("--val", 0, "--shard_tokens", 300, self.folder / "whole.txt")
        self.assertEqual(self.tokenize(*words, out="again").returncode, 0)
        for path in shards:
            self.assertEqual((self.folder / "again" / path.name).read_bytes(), path.read_bytes())

    def test_errors_of_shards_back_to_text(self) -> None:
        def turn(data: bytes, *words: object) -> subprocess.CompletedProcess:
            (self.folder / "a.bin").write_bytes(data)
            return call("detokenize.py", "--vocab", self.vocab, self.folder / "a.bin", *words)

        header = struct.pack("<256i", 20240520, 1, 2, *[0] * 253)
        self.assertEqual(turn(header + struct.pack("<2H", 50256, 65)).stdout, "A")
        self.assert_one_line_error(turn(header + struct.pack("<H", 65)), "a.bin: has 1 of its 2 tokens")
        self.assert_one_line_error(turn(header + struct.pack("<2H", 65, 50257)), "a.bin: has token 50257")
        self.assert_one_line_error(turn(b"text"), "a.bin: not a token shard")
        self.assert_one_line_error(turn(header, "--tokens", 0), "--tokens 0")
        self.assert_one_line_error(turn(header, self.folder / "none.bin"), "none.bin: no such file")
        self.assert_one_line_error(turn(header, self.folder), "is a folder")
        self.vocab.write_text("train_gdn vocabulary 1\nletters\nnumbers\nspaces\n41\n")
        self.assert_one_line_error(turn(header), "has 1 tokens, expected the 50256")
        self.vocab.write_text("train_gdn vocabulary 1\nletters\nnumbers\nspaces\nxyz\n")
        self.assert_one_line_error(turn(header), "expected a token in hexadecimal")

    def test_errors(self) -> None:
        text = self.folder / "a.txt"
        text.write_bytes(b"\xff\xfe")
        self.assert_one_line_error(self.tokenize(text), "a.txt: not UTF-8")
        self.assert_one_line_error(self.tokenize(self.folder / "none.txt"), "none.txt: no such file")
        self.assert_one_line_error(self.tokenize(self.folder), "is a folder")
        text.write_text("")
        self.assert_one_line_error(self.tokenize(text, out="e"), "no documents")
        line = self.folder / "b.jsonl"
        line.write_text('{"text": "a"}\n{"txt": "b"}\n')
        self.assert_one_line_error(self.tokenize(line, out="j"), "b.jsonl: line 2")
        self.assert_one_line_error(self.tokenize("--val", 1, line), "--val 1.0")
        self.assert_one_line_error(self.tokenize("--processes", 0, line), "--processes 0")
        (self.folder / "full").mkdir()
        (self.folder / "full" / "train_000000.bin").write_text("")
        self.assert_one_line_error(self.tokenize(line, out="full"), "no progress.json")
        self.vocab.write_text("aGVsbG8= 0\n")
        self.assert_one_line_error(self.tokenize(line), "has 1 tokens, expected the 50256")
        self.vocab = self.folder
        self.assert_one_line_error(self.tokenize(line), "expected vocab.bpe and encoder.json")
        (self.folder / "tiktoken.py").write_text("raise ImportError('none', name='tiktoken')\n")
        self.assert_one_line_error(self.tokenize(line, PYTHONPATH=str(self.folder)), "needs the package tiktoken")


@needs_tokenizers
class TokenizersOfJson(InFolder):
    """A tokenizer.json with byte-level BPE, made here."""

    def setUp(self) -> None:
        super().setUp()
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<pad>", "<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False)  # fmt: skip
        self.tokenizer.train_from_iterator(["the cat sat on the mat, the hat"] * 9, trainer)
        self.file = self.folder / "given.json"
        self.tokenizer.enable_truncation(4)  # as many files have it: documents are not to be cut
        self.tokenizer.save(str(self.file))
        self.tokenizer.no_truncation()
        self.rows = ["the cat, the hat", "über <s> 語", "", "the end" * 40]
        self.text = self.folder / "a.jsonl"
        self.text.write_text("".join(json.dumps({"text": row}) + "\n" for row in self.rows))

    def run_on(self, *arguments: object, out: str = "out") -> subprocess.CompletedProcess:
        words = ("--out", self.folder / out, "--tokenizer", self.file, "--processes", 2, "--val", 0, *arguments)
        return call("tokenize_text.py", self.text, *words)

    def turn(self, *arguments: object) -> subprocess.CompletedProcess:
        return call("detokenize.py", "--tokenizer", self.folder / "out/tokenizer.json", *arguments)

    def test_shards_and_text_again(self) -> None:
        done = self.run_on()
        self.assertEqual(done.returncode, 0, done.stderr)
        size = self.tokenizer.get_vocab_size()
        self.assertIn(f"train with -vocab_size {size} -separator 1", done.stdout)
        self.assertEqual((self.folder / "out/tokenizer.json").read_bytes(), self.file.read_bytes())
        tokens = read_shard(self.folder / "out/train_000000.bin")
        documents = [list(map(int, d.split())) for d in " ".join(map(str, tokens)).replace(" 1 ", "|")[2:].split("|")]
        self.assertEqual([self.tokenizer.decode(d) for d in documents], [row for row in self.rows if row])
        self.assertLess(len(documents[0]), len(self.rows[0]) // 2)  # by the merges, not byte by byte
        text = "<s>".join(["", *filter(None, self.rows)])  # the document's own <s> is text, not the token
        self.assertEqual(self.turn(self.folder / "out/train_000000.bin").stdout, text)
        self.assertEqual(self.turn(self.folder / "out/train_000000.bin", "--tokens", 1).stdout, "<s>")

        ids = self.folder / "ids.txt"  # as ./train_gdn -gen prints them
        ids.write_text(" ".join(map(str, documents[1])) + "\n")
        self.assertEqual(self.turn("--ids", ids).stdout, self.rows[1])
        ids.write_text("3 x")
        self.assert_one_line_error(self.turn("--ids", ids), "ids.txt: 'x', expected token ids")
        ids.write_text(f"3 {size}")
        self.assert_one_line_error(self.turn("--ids", ids), f"has token {size}, expected at most {size - 1}")

    def test_many_tokens_take_32_bits(self) -> None:
        self.tokenizer.add_tokens([f"[{i}]" for i in range(70_000)])
        self.tokenizer.save(str(self.file))
        self.text.write_text(json.dumps({"text": "[69999]the" * 50}) + "\n")
        done = self.run_on("--val", 0.1)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"-vocab_size {self.tokenizer.get_vocab_size()} ", done.stdout)
        read = []
        for name in ("train", "val"):
            data = (self.folder / "out" / f"{name}_000000.bin").read_bytes()
            header = struct.unpack("<256i", data[:1024])
            tokens = struct.unpack(f"<{len(data) // 4 - 256}I", data[1024:])
            self.assertEqual(header[:3], (20240801, 7, len(tokens)))
            self.assertEqual(tokens[0], 1)
            read += tokens[1:]
        self.assertEqual(read, self.tokenizer.encode(self.text.read_text()[10:-3]).ids)
        self.assertIn("[69999]the", self.turn(self.folder / "out/train_000000.bin").stdout)

    @needs_train_gdn
    def test_training_on_them(self) -> None:
        self.text.write_text(json.dumps({"text": "the cat sat on the mat, " * 900}) + "\n")
        done = self.run_on("--val", 0.1)
        given = done.stdout.strip().splitlines()[-1].split("train with ")[1].split()
        words = ("-d cpu -w 32 -heads 1 -L 1 -T 32 -B 4 -n 3 -s 0 -o").split()
        out = self.folder / "out"
        trained = subprocess.run([TRAIN_GDN, "-i", out / "train_000000.bin", "-j", out / "val_000000.bin", *given, *words,
                                  self.folder / "run"], capture_output=True, text=True, timeout=300)
        self.assertEqual(trained.returncode, 0, trained.stderr)
        sample = subprocess.run([TRAIN_GDN, "-d", "cpu", "-load", self.folder / "run", "-gen", "20"], capture_output=True,
                                text=True, timeout=300)
        self.assertEqual(sample.returncode, 0, sample.stderr)
        ids = self.folder / "ids.txt"
        ids.write_text(sample.stdout)
        text = self.turn("--ids", ids)
        self.assertEqual(text.returncode, 0, text.stderr)
        self.assertEqual(text.stdout, self.tokenizer.decode(list(map(int, sample.stdout.split())), skip_special_tokens=False))

    def test_refusals(self) -> None:
        self.assert_one_line_error(self.run_on("--separator", "<no>"), "has no token <no>", "its special tokens: <pad>, <s>")
        self.assert_one_line_error(self.run_on("--vocab", self.file), "--vocab and --tokenizer: expected one of them")
        self.assertIn("-separator 0", self.run_on("--separator", "<pad>").stdout)
        self.assert_one_line_error(self.run_on(), "was begun with other vocabulary")
        self.file.write_text("{}")
        self.assert_one_line_error(self.run_on(out="other"), "given.json: not a tokenizer.json")
        self.file.unlink()
        self.assert_one_line_error(self.run_on(out="other"), "given.json: no such file")


if __name__ == "__main__":
    unittest.main()
