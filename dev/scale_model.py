#!/usr/bin/env python3
"""A step's time and a rank's memory on up to 1,024 GPUs, from measured parts (dev/doc/scale.md).

    python3 dev/scale_model.py [--width 1024] [--micro-batches N] [--table]

Of one GPU: the time of a micro-batch and of the update, as measured. Of the links: bytes over bandwidth, and a latency a
message. What is exchanged is what gdn/optimizer.h and gdn/communicator.h exchange, group by group of the arena, in the
order of the backward; the exchange of a group begins when its gradients are there and the exchange before has ended. The
gathers of weights follow one another in the order of the forward, which waits for each group.
No packages.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

BLOCK = 4096  # kArenaBlock
GIB = 2.0**30


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    dk: int
    dv: int
    mlp: int
    vocabulary: int  # padded
    tied: bool = True

    def matrices(self) -> int:
        """Numbers of a layer's group of the arena."""
        keys, values = self.heads * self.dk, self.heads * self.dv
        columns = -(-(2 * keys + 2 * values + 2 * self.heads) // 8) * 8
        return self.width * (columns + values) + 3 * self.width * self.mlp

    def vectors(self) -> int:
        keys, values = self.heads * self.dk, self.heads * self.dv
        return self.layers * (2 * self.width + 4 * (2 * keys + values) + 2 * self.heads + self.dv) + self.width

    def groups(self, ranks: int) -> list[int]:
        """Numbers of the groups as a backward completes them: the head, the layers from the last one, the embedding, the
        vectors."""
        unit = BLOCK * ranks
        embedding = self.vocabulary * self.width
        sizes = [embedding] * (not self.tied) + [self.matrices()] * self.layers + [embedding, self.vectors()]
        return [-(-size // unit) * unit for size in sizes]

    def forward_groups(self, ranks: int) -> list[int]:
        """Numbers of the groups as a forward reads them: the embedding, the vectors, the layers, the head."""
        head = [] if self.tied else self.groups(ranks)[:1]
        *layers, embedding, vectors = self.groups(ranks)[len(head) :]
        return [embedding, vectors, *layers, *head]

    def parameters(self) -> int:
        return sum(self.groups(1))


@dataclass(frozen=True)
class Measured:
    """One GPU: milliseconds of a step with one micro-batch, its AdamW update among them, and GiB in use."""

    name: str
    shape: Shape
    sequences: int
    length: int
    step: float
    update: float
    gib: float
    record: str

    def activations(self) -> float:
        """GiB of what does not depend on the number of ranks: activations, work space."""
        return self.gib - 18 * self.shape.parameters() / GIB


@dataclass(frozen=True)
class Links:
    """Bytes a second of a GPU, one way, to the GPUs of its host and to another host; seconds a message."""

    name: str
    per_host: int
    inside: float
    outside: float
    latency_inside: float
    latency_outside: float

    def between(self, distance: int) -> tuple[float, float]:
        """Of ranks so far apart."""
        inside = distance < self.per_host
        return (self.inside, self.latency_inside) if inside else (self.outside, self.latency_outside)


# AdamW 1.827 ms and norm 0.227 ms for 171.2M parameters (gdn/kernels/optimizer.cuh), scaled by the parameters
UPDATE = (1.827 + 0.227) / 171.2e6
MODELS = [
    Measured("d 1024, 8 layers", Shape(1024, 8, 6, 128, 256, 2816, 50304), 32, 1024, 69.8, 171.2e6 * UPDATE, 14.8,
             "dev/results/peers"),
    Measured("d 2048, 21 layers", Shape(2048, 21, 6, 256, 512, 5632, 50304), 8, 1024, 143.3, 1.36e9 * UPDATE, 39.5,
             "dev/results/peers"),
]  # fmt: skip
LINKS = [
    Links("NVLink 4 + 8 x 400 Gbit/s", 8, 360e9, 45e9, 12e-6, 20e-6),
    Links("NVLink 4 + 1 x 100 Gbit/s", 8, 360e9, 11e9 / 8, 12e-6, 25e-6),
    Links("PCIe 4, 25 Gbit/s a host", 4, 20e9, 2.8e9 / 4, 15e-6, 40e-6),
]


def log2(ranks: int) -> int:
    return ranks.bit_length() - 1


def exchange_of(numbers: int, ranks: int, links: Links) -> float:
    """Seconds to sum a group over the ranks: recursive halving, neighbours first."""
    seconds, left = 0.0, 4.0 * numbers
    for bit in range(log2(ranks)):
        left /= 2
        bandwidth, latency = links.between(1 << bit)
        seconds += left / bandwidth + latency + left / 4 * 12 / 4.3e12  # and the sum, at the copy rate
    return seconds


def gather_of(nbytes: float, ranks: int, links: Links) -> float:
    """Seconds of an all-gather. A ring crosses to another host once a host: all its GPUs' links carry it."""
    if ranks == 1:
        return 0.0
    inside = nbytes * (min(ranks, links.per_host) - 1) / min(ranks, links.per_host) / links.inside
    hosts = -(-ranks // links.per_host)
    outside = nbytes * (hosts - 1) / hosts / (links.outside * links.per_host) if hosts > 1 else 0.0
    return max(inside, outside) + log2(ranks) * links.between(ranks // 2)[1]


@dataclass
class Step:
    milliseconds: float
    exposed: float  # of the gradients' exchange
    gather: float  # of weights
    gather_exposed: float
    gib: float  # a rank


def step(model: Measured, ranks: int, micro_batches: int, links: Links) -> Step:
    """micro_batches: of a rank."""
    parameters = model.shape.parameters()
    micro = (model.step - model.update) / 1000
    backward = 2 / 3 * micro
    groups = model.shape.groups(ranks)
    # The backward completes groups at times in proportion to their numbers; the embedding and the vectors at its end.
    matrices = groups[:-2]
    now, free = micro - backward, 0.0
    for i, size in enumerate(groups):
        now = min(micro, now + backward * size / sum(matrices)) if i < len(matrices) else micro
        free = max(free, now) + exchange_of(size, ranks, links)
    exposed = max(0.0, free - micro) if ranks > 1 else 0.0
    # The layers of the forward take times in proportion to their numbers; the vectors travel as floats, too.
    forward = model.shape.forward_groups(ranks)
    layers = sum(forward[2:])
    now = gather = gather_exposed = 0.0
    for i, size in enumerate(forward):
        gather += gather_of((6.0 if i == 1 else 2.0) * size, ranks, links)
        gather_exposed += max(0.0, gather - now)
        now = max(now, gather) + (micro - backward) * (size / layers if i > 1 else 0)
    sums = gather_of(8.0 * parameters / BLOCK, ranks, links)
    spares = max(0, (micro_batches - 1).bit_length())
    tree = (micro_batches - 1) * parameters * (12 + 4) / 4.3e12  # adds, and one buffer more is zeroed
    seconds = micro_batches * micro + tree + exposed + model.update / 1000 / ranks + sums + gather_exposed
    memory = parameters * (2 + 4 * (1 + spares) + 12 / ranks) + (2 * max(groups) if ranks > 1 else 0)
    return Step(1000 * seconds, 1000 * exposed, 1000 * gather, 1000 * gather_exposed, memory / GIB + model.activations())


def table(model: Measured, links: Links, micro_batches: int) -> None:
    print(f"\n{model.name} ({model.shape.parameters() / 1e6:.0f}M numbers), {micro_batches} x {model.sequences} "
          f"sequences of {model.length} a rank; {links.name}")  # fmt: skip
    print("| ranks | ms a step | exchange exposed | gather | of it exposed | weak scaling | tokens/s, million | GiB a rank |")
    print("|---|---|---|---|---|---|---|---|")
    one = step(model, 1, micro_batches, links).milliseconds
    for ranks in (1, 2, 4, 8, 16, 64, 256, 1024):
        s = step(model, ranks, micro_batches, links)
        tokens = ranks * micro_batches * model.sequences * model.length / s.milliseconds / 1000
        print(f"| {ranks} | {s.milliseconds:.1f} | {s.exposed:.2f} | {s.gather:.2f} | {s.gather_exposed:.2f} | {100 * one / s.milliseconds:.1f}% "
              f"| {tokens:.2f} | {s.gib:.1f} |")  # fmt: skip


def memory(name: str, shape: Shape, ranks: tuple[int, ...]) -> None:
    p = shape.parameters()
    cells = " | ".join(f"{(2 + 4 + 12 / r) * p / GIB:.0f}" for r in ranks)
    print(f"| {name}, {p / 1e9:.1f}e9 numbers | {cells} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=int, choices=[m.shape.width for m in MODELS], help="one of the models alone")
    p.add_argument("--micro-batches", type=int, default=1, help="of a rank [1]")
    a = p.parse_args()
    if a.micro_batches < 1:
        p.error(f"--micro-batches {a.micro_batches}: expected 1 or more")
    for model in MODELS:
        for links in LINKS:
            if a.width in (None, model.shape.width):
                table(model, links, a.micro_batches)
    print("\nWithout activations, one micro-batch a rank: GiB a rank by the number of ranks")
    print("| | 1 | 8 | 64 | 1024 |\n|---|---|---|---|---|")
    for name, shape in (
        ("d 2048, 21 layers", MODELS[1].shape),
        ("7B: d 4096, 32 layers", Shape(4096, 32, 16, 192, 384, 11008, 50304)),
        ("30B: d 7168, 48 layers", Shape(7168, 48, 28, 192, 384, 19200, 50304)),
    ):
        memory(name, shape, (1, 8, 64, 1024))


if __name__ == "__main__":
    main()
