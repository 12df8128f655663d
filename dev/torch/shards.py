"""Token shards (.bin of llm.c and modded-nanogpt) as sequences, in the orders a training can visit them.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then uint16 tokens. Sequence i of
a file covers its tokens [iT, iT + T]; a file of n tokens holds (n - 1) // T of them (../../dataloader.h).
"""

import glob
import sys

import packages  # noqa: F401
import numpy as np

VOCAB = 50257


def u64(x) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, dtype=np.uint64))


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function, modulo 2^64 (arrays wrap silently)."""
    x = u64(x) + u64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> u64(27))) * u64(0x94D049BB133111EB)
    return x ^ (x >> u64(31))


def permuted(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """data::permuted of dataloader.h, elementwise: a six-round Feistel network with cycle walking."""
    half_bits = next(h for h in range(33) if 1 << 2 * h >= n)
    shift, mask = u64(half_bits), u64((1 << half_bits) - 1)
    i, todo = u64(i).copy(), np.ones(np.shape(i), bool)
    while todo.any():
        left, right = i[todo] >> shift, i[todo] & mask
        for step in range(6):
            left, right = right, left ^ (mix64(mix64(key[todo] + u64(step)) + right) & mask)
        i[todo] = left << shift | right
        todo &= i >= u64(n)
    return i.astype(np.int64)


def shuffled(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """DataLoader::shuffled: the sequence, of n, that each position visits."""
    p = u64(positions)
    return permuted(p % u64(n), n, mix64(mix64(u64(seed)) ^ (p // u64(n))))


class Shards:
    """tokens [sum of n] uint16 over all files; starts [N] int64: where each sequence, in file order, begins."""

    def __init__(self, pattern: str, length: int):
        paths = sorted(glob.glob(pattern))
        if not paths:
            sys.exit(f"no file matches '{pattern}' (unpack .bin.xz with: xz -dk FILE)")
        files = [read_shard(path) for path in paths]
        self.length, self.tokens = length, np.concatenate(files)
        offsets = np.cumsum([0] + [len(f) for f in files])
        self.starts = np.concatenate(
            [at + length * np.arange((len(f) - 1) // length) for at, f in zip(offsets, files)])
        if len(self.starts) == 0:
            sys.exit(f"{pattern}: no file holds a sequence of {length} + 1 tokens")

    def order(self, kind: str, count: int, seed: int) -> np.ndarray:
        """First tokens [count] int64 of the first `count` sequences of a training.

        ours: dataloader.h's; sequential: file order, again and again; random: anywhere, with replacement, as nanoGPT.
        """
        positions, n = np.arange(count), len(self.starts)
        if kind == "ours":
            return self.starts[shuffled(positions, n, seed)]
        if kind == "sequential":
            return self.starts[positions % n]
        return np.random.default_rng(seed).integers(0, len(self.tokens) - self.length, count)


def read_shard(path: str) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        sys.exit(f"{path}: begins with {header[:2].tolist()}, expected a token shard (20240520, 1)")
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    if len(tokens) != header[2] or tokens.max(initial=0) >= VOCAB:
        sys.exit(f"{path}: {len(tokens)} tokens up to {tokens.max(initial=0)}, "
                 f"expected {header[2]} below {VOCAB}")
    return tokens


def write_shard(path: str, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    with open(path, "wb") as file:
        header.tofile(file)
        np.asarray(tokens).astype("<u2").tofile(file)
