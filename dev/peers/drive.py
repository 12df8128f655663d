#!/usr/bin/env python3
"""Times the peers one after another, round by round, each in a process of its own that lives through the run.

    drive.py kernels|steps|tune --seconds N [--peers ours,fla,...] [--small]

kernels: for each shape every peer loads the same inputs and is held to float64; who is off, or leaves something unwritten, is not
timed. Then in rounds (ours, peer, ours, peer, ...) each case is timed, so that a drift of the clocks shows in the rounds.
steps:   training steps of the same sizes, likewise in rounds; ours is dev/bench_step.
tune:    lets fla's autotuners measure their configurations, with the GPU to themselves; the choice stays in Triton's cache.
Only one process works at a time. What does not fit into --seconds is named. Results are lines of PEERS_OUT/peers.jsonl.
"""

import argparse
import csv
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = dict(ours="peer_ours.py", fla="peer_fla.py", jla="peer_jla.py", flashinfer="peer_flashinfer.py",
               flashqla="peer_flashqla.py", fla_tilelang="peer_fla.py")
ENVIRONMENT = dict(fla=dict(FLA_TILELANG="0", FLA_FLASH_QLA="0"), fla_tilelang=dict(FLA_TILELANG="1", FLA_FLASH_QLA="0"))
ONLY_128 = ("flashinfer", "flashqla", "fla_tilelang")
RECORD = common.Record()
START = time.time()


def say(line: str) -> None:
    print(line, flush=True)


class Peer:
    def __init__(self, name: str, log: Path, environment: dict):
        self.name, self.log = name, log
        self.process, self.buffer = None, b""
        self.environment = {**os.environ, "FLA_CACHE_RESULTS": "1", "PYTHONUNBUFFERED": "1", **environment,
                            **ENVIRONMENT.get(name, {})}

    def start(self) -> None:
        self.buffer = b""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, str(HERE / SCRIPTS[self.name])], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=log, env=self.environment)

    def ask(self, seconds: float, **request) -> dict:
        """The answer, or {"error": line}; a process that does not answer in time is ended."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: below
        end = time.time() + seconds
        while b"\n" not in self.buffer:
            left = end - time.time()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                self.stop()
                return dict(error=f"no answer within {seconds:.0f} s")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                self.process.wait()
                lines = self.log.read_text(errors="replace").strip().splitlines()
                return dict(error=f"its process ended ({self.process.returncode}): {(lines or ['no output'])[-1][:300]}")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def left(o) -> float:
    return o.seconds - (time.time() - START)


def start_all(o, names: list[str], environment: dict) -> dict[str, Peer]:
    """Their imports side by side; the first line of each that cannot run is said."""
    logs = common.WORK / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    peers = {name: Peer(name, logs / f"{name}_{o.what}.log", environment) for name in names}
    for peer in peers.values():
        peer.start()
    for name, peer in list(peers.items()):
        about = peer.ask(min(60, left(o)), do="about")
        if "error" in about:
            say(f"{name}: not measured: {about['error']}")
            RECORD.add("absent", peer=name, error=about["error"])
            del peers[name]
        else:
            RECORD.add("about", peer=name, **about)
    return peers


# ---- kernels ----------------------------------------------------------------------------------------------------


def kernels(o) -> None:
    shapes = o.shapes or (common.SMALL_SHAPES if o.small else common.SHAPES)
    peers = start_all(o, o.peers, {})
    for index, shape in enumerate(shapes):
        if left(o) < 8:
            say(f"{shape}: not measured, {o.seconds:.0f} s were over")
            RECORD.add("failed", peer="all", shape=shape, case="kernels", error="not measured, the time was over")
            continue
        share = left(o) / (len(shapes) - index)
        ready = {}
        for name, peer in peers.items():
            if name in ONLY_128 and not shape.endswith(",128,128") and not o.small:
                continue
            answer = peer.ask(min(max(10, share), left(o)), do="prepare", shape=shape)
            wrong = answer.get("error") or answer.get("wrong")
            RECORD.add("check", peer=name, shape=shape, **{key: answer.get(key) for key in ("errors", "kept_mib", "notes")},
                       wrong=wrong)
            if wrong:
                say(f"{name} {shape}: our script or the peer, not timed: {wrong}")
                peer.ask(10, do="drop")
            else:
                ready[name] = answer
                say(f"{name} {shape}: worst error {max(answer['errors'].values()):.2e} ({answer['seconds']} s)")
        found = {}
        for round_ in range(o.rounds):
            order = [name for name in ready if name != "ours"]
            # ours before each peer
            turns = [turn for name in order for turn in ((("ours",) if "ours" in ready else ()) + (name,))] or list(ready)
            for name in turns:
                cases = [(case, "time") for case in ready[name]["cases"]]
                cases += [(case, "time_eager") for case in ready[name]["eager"]] if round_ == 0 else []
                for case, do in cases:
                    if left(o) < 2:
                        break
                    answer = peers[name].ask(min(20, left(o)), do=do, case=case, runs=o.runs)
                    key = (name, case + ("_eager" if do == "time_eager" else ""))
                    if "error" in answer:
                        say(f"{name} {shape} {key[1]}: {answer['error']}")
                        RECORD.add("failed", peer=name, shape=shape, case=key[1], error=answer["error"])
                        ready[name]["cases" if do == "time" else "eager"].remove(case)
                        peers[name].stop()  # a capture that failed leaves nothing to rely on
                        peers[name].ask(min(60, left(o)), do="prepare", shape=shape)
                        continue
                    at = found.setdefault(key, dict(rounds=[], host=[]))
                    at["rounds"].append(answer["ms"])
                    at["host"] += [answer["host_ms"]] if "host_ms" in answer else []
        for (name, case), at in found.items():
            host = dict(host_ms=min(at["host"])) if at["host"] else {}
            RECORD.add("time", peer=name, shape=shape, case=case, **common.summary(at["rounds"]), **host)
            times = common.summary(at["rounds"])
            say(f"  {name:12} {case:16} {times['ms']:8.3f} ms  [{times['least']:.3f}, {times['most']:.3f}]")
        for name in ready:
            peers[name].ask(20, do="drop")
    for peer in peers.values():
        peer.stop()


# ---- steps ------------------------------------------------------------------------------------------------------


def our_step(spec: str, steps: int) -> dict:
    """dev/bench_step, whose shapes these are."""
    width, batch, layers = map(int, spec.split(",")[:3])
    if (batch, layers) != ((8, 21) if width >= 2048 else (32, 8)):
        return dict(error="dev/bench_step has no such shape")
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        done = subprocess.run([str(ROOT / "dev" / "bench_step"), "-d", str(width), "-steps", str(steps), "-csv", file.name],
                              capture_output=True, text=True)
        if done.returncode:
            return dict(error=(done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        rows = list(csv.DictReader(open(file.name)))
    if not rows:
        return dict(error=done.stdout.strip().splitlines()[-1])
    return dict(ms=[float(rows[0]["ms"])], gib=float(rows[0]["plan_gib"]), first_s=float(rows[0]["first_s"]),
                how="CUDA graphs", parameters=int(rows[0]["parameters"]))


# FP8 before bf16: JAX tells the peak of a process, and FP8 needs less
VARIANTS = (("ours", None), ("fla", "eager"), ("fla", "graph"), ("ours", None), ("jla", "fp8"), ("jla", "bf16"),
            ("fla", "compile"))


def steps(o) -> None:
    specs = o.shapes or (common.SMALL_STEPS if o.small else common.STEPS)
    found, problems = {}, {}
    peers = start_all(o, [name for name in ("fla", "jla") if name in o.peers], {})
    for spec in specs:
        width = int(spec.split(",")[0])
        if not o.small:
            for name in ("fla", "jla"):  # nothing of the last size is kept in memory, or in JAX's allocator
                if name in peers:
                    peers[name].stop()
        for round_ in range(o.rounds):
            for name, mode in VARIANTS:
                if name not in peers and name != "ours" or name not in o.peers or (name, mode, spec) in problems:
                    continue
                if name == "jla" and width < 512 and not o.small:
                    continue  # its kernels have no head of 32 keys
                if mode == "compile" and (round_ or spec not in o.compiled):
                    continue
                if left(o) < 6:
                    problems[name, mode, spec] = "not measured, the time was over"
                    continue
                if name == "ours":
                    answer = our_step(spec, o.runs)
                else:
                    what = dict(spec=spec + (",fp8" if mode == "fp8" else ""), steps=o.runs)
                    answer = peers[name].ask(min(o.each, left(o)), do="step", **what, **(dict(mode=mode) if name == "fla" else {}))
                if "losses" in answer and not all(0 < x < 20 for x in answer["losses"]):
                    answer = dict(error=f"losses {answer['losses']}: our script or the peer, not timed")
                if "error" in answer:
                    problems[name, mode, spec] = answer["error"]
                    if name in peers:
                        peers[name].stop()
                    say(f"{name} {mode or ''} {spec}: {answer['error']}")
                    RECORD.add("failed", peer=name, shape=spec, case=f"step {mode or ''}".strip(), error=answer["error"])
                    continue
                at = found.setdefault((name, mode, spec), dict(rounds=[], first=answer))
                at["rounds"].append(answer.pop("ms"))
                say(f"{name} {mode or ''} {spec}: {common.summary(at['rounds'])['ms']:.1f} ms ({answer.get('seconds', '-')} s)")
        for (name, mode, at_spec), at in found.items():
            if at_spec == spec:
                extra = {key: at["first"].get(key) for key in ("gib", "losses", "host_ms", "how", "parameters", "first_s")}
                RECORD.add("step", peer=name, mode=mode, shape=spec, **common.summary(at["rounds"]), **extra)
    for (name, mode, spec), why in problems.items():
        if why.startswith("not measured"):
            RECORD.add("failed", peer=name, shape=spec, case=f"step {mode or ''}".strip(), error=why)
    for peer in peers.values():
        peer.stop()


def tune(o) -> None:
    peers = start_all(o, [name for name in ("fla", "fla_tilelang") if name in o.peers], {})
    for shape in o.shapes or (common.SMALL_SHAPES if o.small else common.SHAPES[:3]):
        for name, peer in peers.items():
            if name == "fla_tilelang" and not shape.endswith(",128,128"):
                continue
            if left(o) > 5:
                answer = peer.ask(left(o), do="prepare", shape=shape)
                say(f"{name} {shape}: tuned in {answer.get('seconds', '-')} s {answer.get('error') or answer.get('wrong') or ''}")
                if "error" not in answer:
                    peer.ask(max(1, left(o)), do="time", case="both_norms", runs=2)
    for spec in o.steps_too if not o.small else ():
        if "fla" in peers and left(o) > 10:
            answer = peers["fla"].ask(left(o), do="step", spec=spec, steps=2, mode="eager")
            say(f"fla step {spec}: tuned in {answer.get('seconds', '-')} s {answer.get('error', '')}")
    for peer in peers.values():
        peer.stop()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["kernels", "steps", "tune"])
    p.add_argument("--seconds", type=float, default=120, help="wall time for all [120]")
    p.add_argument("--peers", default="ours,fla,jla,flashinfer,flashqla", help="[ours,fla,jla,flashinfer,flashqla]")
    p.add_argument("--shapes", nargs="*", help="B,T,Hk,Hv,dk,dv; of steps d,B,L [common.py's]")
    p.add_argument("--rounds", type=int, default=2, help="[2]")
    p.add_argument("--runs", type=int, default=20, help="replays, programs or steps in a round [20]")
    p.add_argument("--each", type=float, default=60, help="seconds for one step's measurement [60]")
    p.add_argument("--compiled", nargs="*", default=["1024,32,8"], help="steps that fla also runs under torch.compile")
    p.add_argument("--steps-too", nargs="*", default=common.STEPS, help="tune: the steps whose kernels are tuned")
    p.add_argument("--small", action="store_true", help="a dry run with small shapes, also on a CPU")
    o = p.parse_args()
    o.peers = o.peers.split(",")
    if unknown := [name for name in o.peers if name not in SCRIPTS]:
        sys.exit(f"drive.py: --peers {unknown[0]}: expected some of {', '.join(SCRIPTS)}")
    dict(kernels=kernels, steps=steps, tune=tune)[o.what](o)


if __name__ == "__main__":
    main()
