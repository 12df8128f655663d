#!/usr/bin/env python3
"""Token shards (.bin of train_gdn, llm.c and modded-nanogpt, GPT-2's tokens) back to text.

    python3 scripts/detokenize.py --vocab shards/vocab.txt --tokens 1000 shards/val_000000.bin
    python3 scripts/detokenize.py --vocab gpt2_files --tokens 3000000 --out books.txt books_train_000.bin
    ./train_gdn -load run_001 -gen 200 | python3 scripts/detokenize.py --tokenizer shards/tokenizer.json --ids -

To see what is in a shard, or to train on the same text as bytes (./train_gdn -i books.txt). Between documents stands
--separator; with the default, tokenize_text.py gives back the same tokens where they are GPT-2's own of that text.

--vocab takes what tokenize_text.py's takes (a folder with vocab.bpe and encoder.json, a .tiktoken file, the vocab.txt
that it writes). Without it tiktoken fetches GPT-2's files. --tokenizer takes a tokenizer.json; --separator is then the
token's own text.
"""

from __future__ import annotations

import argparse
import array
import struct
import sys
from pathlib import Path

from common import Error, Parser, run_main
from tokenize_text import END_OF_TEXT, SEPARATOR, TokenizerJson, read_vocabulary


def tokens_of(path: Path | None) -> list[bytes]:
    """The bytes of each token by its number, the end of a document left out."""
    ranks = read_vocabulary(path)
    return sorted(ranks, key=ranks.__getitem__)


def read_shard(path: Path, limit: int | None) -> array.array:
    """Its first `limit` tokens, or all."""
    with path.open("rb") as file:
        header = file.read(1024)
        magic, version, count = struct.unpack_from("<3i", header) if len(header) == 1024 else (0, 0, 0)
        if (magic, version) not in ((20240520, 1), (20240801, 7)):
            raise Error(f"{path}: not a token shard (it begins with {magic}, {version}, expected 20240520, 1 or 20240801, 7)")
        wanted = count if limit is None else min(count, limit)
        kind, width = ("H", 2) if version == 1 else ("I", 4)
        tokens = array.array(kind, file.read(width * wanted))
    if sys.byteorder == "big":
        tokens.byteswap()
    if len(tokens) != wanted:
        raise Error(f"{path}: has {len(tokens)} of its {count} tokens")
    return tokens


def read_ids(path: Path, limit: int | None) -> list[int]:
    """Numbers in a text, as ./train_gdn -gen prints them where it has no -vocab; - is standard input."""
    words = (sys.stdin.read() if str(path) == "-" else path.read_text()).split()
    for word in words:
        if not word.isdecimal():
            raise Error(f"{path}: '{word}', expected token ids")
    return [int(word) for word in words[:limit]]


def by_tokenizer(a: argparse.Namespace) -> bytes:
    """The text of ids or shards, by a tokenizer.json."""
    tokenizer, left, ids = TokenizerJson(a.tokenizer, a.separator), a.tokens, []
    for path in a.shard:
        ids += read_ids(path, left) if a.ids else read_shard(path, left)
        left = None if a.tokens is None else a.tokens - len(ids)
    if max(ids, default=0) >= tokenizer.size:
        raise Error(f"{a.shard[0]}: has token {max(ids)}, expected at most {tokenizer.size - 1}")
    return tokenizer.text_of(ids).encode()


def main(argv: list[str]) -> int:
    p = Parser(prog="detokenize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shard", nargs="+", type=Path, help=".bin files, in this order")
    p.add_argument("-o", "--out", type=Path, metavar="FILE", help="[standard output]")
    p.add_argument("--vocab", type=Path, metavar="PATH", help="GPT-2's files or vocab.txt [tiktoken fetches them]")
    p.add_argument("--tokens", type=int, metavar="N", help="only the first N tokens of all shards [all]")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, in place of GPT-2's tokens")
    p.add_argument("--ids", action="store_true", help="the files are texts of token ids (- is standard input), no shards")
    between = rf"between documents; \n is a line's end [{SEPARATOR}]"
    p.add_argument("--separator", metavar="TEXT", help=between)
    a = p.parse_args(argv)
    if a.tokens is not None and a.tokens < 1:
        raise Error(f"--tokens {a.tokens}: expected 1 or more")
    for path in a.shard:
        if not path.is_file() and not (a.ids and str(path) == "-"):
            raise Error(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if a.tokenizer is not None:
        if a.vocab is not None:
            raise Error("--vocab and --tokenizer: expected one of them")
        text = by_tokenizer(a)
        if a.out is None:
            sys.stdout.buffer.write(text)
        else:
            a.out.write_bytes(text)
        return 0
    separator = SEPARATOR if a.separator is None else a.separator
    table = [*tokens_of(a.vocab), separator.replace("\\n", "\n").encode()]
    out, left, first = sys.stdout.buffer if a.out is None else a.out.open("wb"), a.tokens, True
    for path in a.shard:
        tokens = read_ids(path, left) if a.ids else read_shard(path, left)
        if max(tokens, default=0) > END_OF_TEXT:
            raise Error(f"{path}: has token {max(tokens)}, expected at most {END_OF_TEXT}")
        begin = 1 if first and tokens and tokens[0] == END_OF_TEXT else 0  # nothing stands before the first document
        out.write(b"".join([table[token] for token in tokens[begin:]]))
        first = first and not tokens
        left = None if left is None else left - len(tokens)
    if a.out is not None:
        out.close()
    return 0


if __name__ == "__main__":
    run_main(main)
