#!/usr/bin/env python3
"""Records of drive.py as tables: report.py [peers.jsonl ...] [-o report.md]; PEERS_OUT/peers.jsonl if none is named. In a column the
best is bold; the rows that train_gdn loses come first.

A ratio is the other's time over train_gdn's (above 1: train_gdn is faster) and, beside it, its inverse. It compares what does the
same work: forwards that keep nothing with each other, and forward + backward as one piece, o and all gradients returned.
A record is one call on one card. A table is of one shape and one call alone; what calls that did not time train_gdn at that shape measured
of the peers is named below it, and counts where it beats train_gdn.
"""

import argparse
import sys
from pathlib import Path

import common

# Times of each peer that were seen before, ms (an NVIDIA H200, 2026-11-30; FlashQLA's as its authors publish them): where one is
# slower now by more than a tenth, something of ours may stand in its way, and the report says so. That run's "both" of
# jax-linear-attention returned no o, so that XLA left the kernel out that makes it: it is "gradients" here.
SEEN = {
    ("fla", "32,1024,6,6,64,128"): dict(forward=0.253, both=0.794),
    ("fla", "32,1024,6,6,128,256"): dict(forward=0.513, both=2.189),
    ("fla", "8,4096,16,32,128,128"): dict(forward=1.632, both=7.266),
    ("fla", "1,32768,16,32,128,128"): dict(forward=2.106, both=8.773),
    ("jla", "32,1024,6,6,64,128"): dict(forward=0.160, gradients=0.444),
    ("jla", "32,1024,6,6,128,256"): dict(forward=0.270, gradients=1.213),
    ("jla", "8,4096,16,32,128,128"): dict(forward=0.661, gradients=2.697),
    ("jla", "1,32768,16,32,128,128"): dict(forward=1.085, gradients=3.372),
    ("flashinfer", "8,4096,16,32,128,128"): dict(forward=0.401),
    ("flashinfer", "1,32768,16,32,128,128"): dict(forward=1.546),
    ("flashqla", "8,4096,16,32,128,128"): dict(forward=0.619, backward=2.89),
    ("flashqla", "1,32768,16,32,128,128"): dict(forward=0.877, backward=2.515),
    ("fla eager", "1024,32,8"): dict(step=115.7), ("fla eager", "512,32,8"): dict(step=75.4),
    ("fla eager", "256,32,8"): dict(step=79.4), ("fla eager", "2048,8,21"): dict(step=246.9),
    ("jla bf16", "1024,32,8"): dict(step=118.4), ("jla fp8", "1024,32,8"): dict(step=104.3),
    ("jla bf16", "512,32,8"): dict(step=56.2), ("jla bf16", "2048,8,21"): dict(step=213.9),
    ("jla fp8", "2048,8,21"): dict(step=180.2),
}
TITLES = dict(ours="train_gdn", fla="fla", jla="jax-linear-attention", flashinfer="FlashInfer", flashqla="FlashQLA",
              fla_tilelang="fla with its TileLang kernel")
KEEPS = dict(ours="states and chunk matrices", fla="chunk matrices; states again in the backward",
             jla="chunk matrices; states again in the backward", flashinfer="forward only, writes the final states",
             flashqla="chunk matrices; states again in the backward", fla_tilelang="chunk matrices; states again in the backward")


def number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def spread(row: dict, digits: int) -> str:
    return f"{row['ms']:.{digits}f} ({row['least']:.{digits}f} to {row['most']:.{digits}f})"


def choose(calls: list[list[dict]]) -> tuple[list[dict], list[dict]]:
    """(rows of the tables; times of peers from calls that did not time train_gdn at that shape). Each row knows its call.

    A shape that no call timed train_gdn at has a table of each call."""
    shown, others = [], []
    calls = [[dict(r, call=n + 1) for r in rows] for n, rows in enumerate(calls)]
    ours = {(r["shape"], r["call"]) for rows in calls for r in rows if r["kind"] in ("time", "step") and r["peer"] == "ours"}
    with_ours = {shape for shape, _ in ours}
    for r in (r for rows in calls for r in rows):
        if r["kind"] not in ("check", "time", "step") or (r["shape"], r["call"]) in ours or r["shape"] not in with_ours:
            shown.append(r)
        elif r["kind"] == "time" and r["peer"] != "ours":
            others.append(r)
    return shown, others


class Report:
    def __init__(self, *calls: list[dict]):
        self.rows, self.elsewhere = choose(calls)
        self.lines, self.calls = [], len(calls)
        self.lost, self.slower = [], []

    def say(self, line: str = "") -> None:
        self.lines.append(line)

    def table(self, head: list[str], body: list[list[str]]) -> None:
        self.say("| " + " | ".join(head) + " |")
        self.say("|---" * len(head) + "|")
        for cells in body:
            self.say("| " + " | ".join(cells) + " |")
        self.say()

    def of_call(self, call: int) -> str:
        return f", call {call}" if self.calls > 1 else ""

    def tables(self, kind: str) -> list[tuple[str, int]]:
        """(shape, call) of the tables of rows of that kind, those of a shape together."""
        shapes = list(dict.fromkeys(r["shape"] for r in self.rows if r["kind"] == kind))
        found = {(r["shape"], r["call"]) for r in self.rows if r["kind"] == kind}
        return sorted(found, key=lambda x: (shapes.index(x[0]), x[1]))

    def compare(self, title: str, what: str, others: dict[str, float], mine: float | None) -> list[str]:
        """Cells of ratios; notes what is lost."""
        if not mine:
            return []
        cells = []
        for name, ms in others.items():
            cells.append(f"{name} {ms / mine:.2f} ({mine / ms:.2f})")
            if ms < mine:
                self.lost.append((ms / mine, f"{title}, {what}: {name} {ms:.3f} ms, train_gdn {mine:.3f}: {mine / ms:.2f} times "
                                             f"its time"))
        return cells

    def seen(self, name: str, shape: str, what: str, ms: float) -> None:
        before = SEEN.get((name, shape), {}).get(what)
        if before and ms > 1.1 * before:
            self.slower.append(f"{name} {shape}, {what}: {ms:.3f} ms, before {before:.3f}")

    def kernels(self) -> None:
        if not self.tables("check"):
            return
        self.say("## The gated delta rule\n")
        self.say("ms on the device, the median (least to most) over rounds in turn: replays of a CUDA graph, of JAX programs queued "
                 "back to back. q and k normalised beforehand, g = -0.1 U(0,1), beta = U(0,1) in float32, the rest bf16. `kept` is "
                 "what lies between forward and backward beside the inputs. `error` is |x - float64| / |float64| of o / the worst "
                 "gradient, in the same run.\n")
        for shape, call in self.tables("check"):
            rows = [r for r in self.rows if r["kind"] in ("check", "time") and (r["shape"], r["call"]) == (shape, call)]
            B, T, Hk, Hv, dk, dv = common.sizes(shape)
            title = f"{B} x {T}, {Hk}/{Hv} heads of {dk} and {dv}{self.of_call(call)}"
            self.say(f"### {title}\n")
            checks = {r["peer"]: r for r in rows if r["kind"] == "check"}
            times = {(r["peer"], r["case"]): r for r in rows if r["kind"] == "time"}
            cases = [case for case in common.CASES if any(c == case for _, c in times)]
            best = {case: min((r["ms"] for (p, c), r in times.items() if c == case), default=None) for case in cases}
            body = []
            for peer, check in checks.items():
                found = check.get("errors") or {}
                worst = max((e for name, e in found.items() if name != "o"), default=None)
                errors = f"{found['o']:.1e} / {f'{worst:.1e}' if worst is not None else '-'}" if "o" in found else "-"
                cells = []
                for case in cases:
                    r = times.get((peer, case))
                    if r is None:
                        cells.append("-")
                        continue
                    text = spread(r, 3)
                    cells.append(f"**{text}**" if r["ms"] == best[case] else text)
                kept = check.get("kept_mib")
                body.append([TITLES[peer], KEEPS[peer], number(kept, 0), *cells, errors])
            self.table(["", "keeps", "kept, MiB", *(common.CASES[c] for c in cases), "error"], body)
            for case in ("forward", "forward_kept", "both"):
                mine = times.get(("ours", case))
                others = {TITLES[p]: r["ms"] for (p, c), r in times.items() if c == case and p != "ours"}
                if mine and others:
                    cells = self.compare(title, common.CASES[case], others, mine["ms"])
                    self.say(f"{common.CASES[case]}, times train_gdn's (its inverse): {'; '.join(cells)}\n")
            mine = times.get(("ours", "both_recomputed"))
            others = {TITLES[p]: r["ms"] for (p, c), r in times.items() if c == "both" and p != "ours"}
            if mine and others:
                cells = self.compare(title, "forward + backward, train_gdn's with nothing kept between", others, mine["ms"])
                self.say(f"forward + backward, train_gdn's with nothing kept between: {'; '.join(cells)}\n")
            cells = []
            for r in self.elsewhere:
                if r["shape"] == shape and r["case"] in ("forward", "both"):
                    cells.append(f"{TITLES[r['peer']]}, {common.CASES[r['case']]}, {spread(r, 3)}")
                    mine = times.get(("ours", r["case"]))
                    if mine and r["ms"] < mine["ms"]:
                        self.compare(title, common.CASES[r["case"]],
                                     {f"{TITLES[r['peer']]} in call {r['call']}": r["ms"]}, mine["ms"])
            if cells:
                self.say(f"In another call, where train_gdn was not timed: {'; '.join(cells)}\n")
            eager = [f"{TITLES[p]} {c.removesuffix('_eager')} {r['ms']:.3f} ms, of which the host takes {r['host_ms']:.3f} to queue it"
                     for (p, c), r in times.items() if c.endswith("_eager")]
            if eager:
                self.say("Called eagerly (not a kernel's time): " + "; ".join(eager) + "\n")
            for (p, c), r in times.items():
                if p == "jla" and r.get("host_ms", 0) > 0.8 * r["ms"]:
                    self.say(f"{TITLES[p]}, {common.CASES[c]}: the host queues one in {r['host_ms']:.3f} ms, so that this time is "
                             f"the host's, and its kernels take less.\n")
                self.seen(p, shape, c, r["ms"])
            for peer, check in checks.items():
                if check.get("wrong"):
                    self.say(f"{TITLES[peer]}: our script or the peer, not timed: {check['wrong']}\n")

    def steps(self) -> None:
        rows = [r for r in self.rows if r["kind"] == "step"]
        if not rows:
            return
        self.say("## One training step\n")
        self.say("6 heads, dv = 2 dk, T = 1024, V = 50304 tied, AdamW, clipping, random tokens; float32 master weights and moments. ms, "
                 "the median (least to most); memory is the allocator's peak (train_gdn: what it plans). eager: as fla's users call it, "
                 "queued without waiting; graph: the whole step as one CUDA graph; FP8: of jax-linear-attention's Linears.\n")
        for shape, call in self.tables("step"):
            d, B, L = shape.split(",")[:3]
            title = f"d = {d}, {L} layers, {B} sequences{self.of_call(call)}"
            of_shape = {(r["peer"], r["mode"]): r for r in rows if (r["shape"], r["call"]) == (shape, call)}
            mine = of_shape.get(("ours", None))
            best = min(r["ms"] for r in of_shape.values())
            body, others = [], {}
            for (peer, mode), r in of_shape.items():
                text = spread(r, 1)
                name = f"{TITLES[peer]} {mode or ''}".strip()
                ratio = "-" if mine is None or peer == "ours" else f"{r['ms'] / mine['ms']:.2f} ({mine['ms'] / r['ms']:.2f})"
                body.append([name, f"**{text}**" if r["ms"] == best else text, number(r.get("gib"), 1),
                             f"{(r.get('parameters') or 0) / 1e6:.1f}", ratio,
                             " -> ".join(f"{x:.2f}" for x in r.get("losses") or []) or "-"])
                if peer != "ours":
                    others[name] = r["ms"]
                self.seen(f"{peer} {mode}", shape, "step", r["ms"])
            self.say(f"### {title}\n")
            self.table(["", "ms", "GiB", "parameters, millions", "times train_gdn's (inverse)", "loss, first -> last"], body)
            self.compare(title, "step", others, mine["ms"] if mine else None)

    def text(self) -> str:
        abouts = {r["peer"]: r for r in self.rows if r["kind"] == "about"}
        self.say("# train_gdn beside its peers\n")
        for r in [r for r in self.rows if r["kind"] == "machine"] or [dict(call=1)]:
            call = f"Call {r['call']}: " if self.calls > 1 else ""
            self.say(f"{call}{r.get('device', 'device not recorded')}, {r.get('date', '')}, commit {r.get('commit', '?')}\n")
        for peer, r in abouts.items():
            self.say(f"- {TITLES[peer]}: {r.get('version')}" + (f"; {r['refusal']}" if r.get("refusal") else ""))
        self.say()
        head, self.lines = self.lines, []
        self.kernels()
        self.steps()
        body, self.lines = self.lines, []
        self.say("## Where train_gdn loses\n")
        for _, line in sorted(self.lost):
            self.say(f"- {line}")
        if not any(r["peer"] == "ours" for r in self.rows if r["kind"] in ("time", "step")):
            self.say("train_gdn was not measured.")
        elif not self.lost:
            self.say("In no row that was measured.")
        self.say()
        steps = {(r["peer"], r["shape"], f"step {r['mode'] or ''}".strip()) for r in self.rows if r["kind"] == "step"}
        problems = [r for r in self.rows if r["kind"] in ("failed", "absent")
                    and (r["peer"], r.get("shape"), r.get("case")) not in steps]  # a second round that the time did not allow
        tail = [f"- {TITLES.get(r['peer'], r['peer'])} {r.get('shape', '')} {r.get('case', '')}: {r['error']}" for r in problems]
        lines = head + self.lines + body
        if tail:
            lines += ["## Not measured\n", *dict.fromkeys(tail), ""]
        if self.slower:
            lines += ["## Slower than seen before: look at our scripts first\n", *(f"- {line}" for line in self.slower), ""]
        return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("records", nargs="*", type=Path, metavar="peers.jsonl", help="one a call [PEERS_OUT/peers.jsonl]")
    p.add_argument("-o", type=Path, metavar="FILE", help="write it there too")
    o = p.parse_args()
    for path in o.records:
        if not path.is_file():
            sys.exit(f"report.py: {path}: no such file")
    text = Report(*map(common.read_record, o.records or [common.Record().path])).text()
    print(text, end="")
    if o.o:
        o.o.write_text(text)


if __name__ == "__main__":
    main()
