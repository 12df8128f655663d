#!/usr/bin/env python3
"""Writes the texts and tiktoken's tokens that test_gdn holds gdn/vocabulary.h to (gdn/tests/golden/bpe_*.txt).

    python3 dev/bpe_golden.py gpt2_files

gpt2_files: what scripts/tokenize_text.py --vocab takes. bpe_vocabulary.txt, in the format of vocab.txt, has GPT-2's
bytes and, in GPT-2's order, the tokens that merging these texts passes through: a merge that never happens is not
missed, so the texts have the same tokens as under all of GPT-2's. bpe_texts.txt has a text a line: its bytes in
hexadecimal, then its tokens' numbers in that vocabulary. Needs tiktoken.
"""

import argparse
import random
import sys
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from common import Error, Parser, import_package, run_main  # noqa: E402
from tokenize_text import PATTERN, Ranks, read_vocabulary, vocabulary_text  # noqa: E402

TEXTS = [
    "Hello, world!",
    " leading space, trailing space ",
    "the  two   three    spaces\n\n\nthree lines\n  indented\t\ttabs \t mixed\r\nwindows \n",
    "I'm you're they've he'll she'd it's don't I'M YOU'RE 'tis ''s 'll' 'x '",
    "1234567890 12,345.67 3rd 4x4 v2.0 \u00bd \u2167 \u0664\u0665 \u4e09",
    "def f(x: int) -> float:\n    return x ** 2  # squared\n",
    "https://example.org/a_b?c=d&e=%20f#g",
    "\u00c4rger \u00fcber stra\u00dfe, na\u00efve caf\u00e9, e\u0301 decomposed",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "a\u00a0b\u2003c\u3000d \u2028e\u0085f\u200bg\u180eh\ufeffi \u00a0 j",
    "<|endoftext|> is text <|endoftext|>",
    "antidisestablishmentarianism SolidGoldMagikarp xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx -------------------------",
    "\x00\x01\x7f control",
    "'",
    " ",
    "\n",
    "",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    r = random.Random(1)
    pools = ["abc '", " \n\t\u00a0", "0aZ\u00e9\u4e2d_", "'sdmtlvre ", "".join(map(chr, range(32, 127)))]
    pools.append("".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")))
    return ["".join(r.choice(r.choice(pools)) for _ in range(r.randrange(1, 40))) for _ in range(count)]


def passed_through(piece: bytes, ranks: Ranks) -> set[bytes]:
    """All tokens that merging a piece makes on the way."""
    parts, made = [bytes([b]) for b in piece], {piece} & ranks.keys()
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        made.add(parts[i])
    return made


def main(argv: list[str]) -> int:
    p = Parser(prog="bpe_golden.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("vocab", type=Path, help="GPT-2's files")
    p.add_argument("--out", type=Path, default=ROOT / "gdn" / "tests" / "golden", help="[gdn/tests/golden]")
    a = p.parse_args(argv)
    tiktoken, regex = import_package("tiktoken"), import_package("regex")  # tiktoken needs regex itself
    ranks = read_vocabulary(a.vocab)
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    texts = TEXTS + random_texts(40)
    kept = {bytes([b]) for b in range(256)}
    for text in texts:
        for piece in regex.findall(PATTERN, text):
            kept |= passed_through(piece.encode(), ranks)
    kept |= {encoding.decode_single_token_bytes(t) for text in texts for t in encoding.encode_ordinary(text)}
    subset = {token: i for i, token in enumerate(sorted(kept, key=ranks.__getitem__))}
    by_subset = tiktoken.Encoding("subset", pat_str=PATTERN, mergeable_ranks=subset, special_tokens={})
    lines = []
    for text in texts:
        tokens = [subset[encoding.decode_single_token_bytes(t)] for t in encoding.encode_ordinary(text)]
        if tokens != by_subset.encode_ordinary(text):
            raise Error(f"{text!r}: has other tokens when the vocabulary is cut")
        lines.append(" ".join([text.encode().hex(), *map(str, tokens)]))
    (a.out / "bpe_vocabulary.txt").write_text(vocabulary_text(subset))
    (a.out / "bpe_texts.txt").write_text("\n".join(lines) + "\n")
    print(f"wrote {len(subset)} tokens and {len(texts)} texts to {a.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
