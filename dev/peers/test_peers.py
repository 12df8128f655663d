#!/usr/bin/env python3
"""Tests of dev/peers; no GPU, and none of the peers. What needs NumPy or PyTorch is skipped where that is missing.

    python3 dev/peers/test_peers.py
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
SHAPE, STEP = "8,4096,16,32,128,128", "1024,32,8"
needs_numpy = unittest.skipUnless(importlib.util.find_spec("numpy"), "NumPy is missing")
needs_torch = unittest.skipUnless(all(map(importlib.util.find_spec, ("numpy", "torch"))), "PyTorch is missing")
sys.path.insert(0, str(HERE))


def check(peer: str, shape: str = SHAPE, **values: object) -> dict:
    return dict(kind="check", peer=peer, shape=shape, errors=dict(o=1e-3, dq=2e-3), kept_mib=1, wrong=None, **values)


def timed(peer: str, case: str, ms: float, shape: str = SHAPE) -> dict:
    return dict(kind="time", peer=peer, shape=shape, case=case, ms=ms, least=ms, most=ms)


@needs_numpy
class Reports(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def report(self, *calls: list[dict]) -> str:
        paths = [self.folder / f"{n}.jsonl" for n in range(len(calls))]
        for path, rows in zip(paths, calls):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = subprocess.run([sys.executable, str(HERE / "report.py"), *map(str, paths)], capture_output=True, text=True,
                              env={**os.environ, "PEERS_OUT": str(self.folder)}, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_lost_rows_come_first_the_worst_first(self) -> None:
        text = self.report([check("ours"), check("fla"), check("flashinfer"), timed("ours", "forward", 0.5), timed("ours", "both", 2),
                            timed("fla", "forward", 1.5), timed("fla", "both", 1.9), timed("flashinfer", "forward", 0.4)])
        lost = text.split("## Where train_gdn loses\n")[1].split("## The gated delta rule")[0].strip().splitlines()
        self.assertEqual([line.split(": ")[1].split(" ")[0] for line in lost], ["FlashInfer", "fla"])
        self.assertIn("**0.400", text)  # the best of a column is bold, whose ever it is
        self.assertNotIn("**0.500", text)

    def test_a_step_that_is_lost_is_said(self) -> None:
        rows = [dict(kind="step", peer=peer, mode=mode, shape=STEP, ms=ms, least=ms, most=ms, losses=None)
                for peer, mode, ms in (("ours", None, 70.0), ("fla", "graph", 60.0))]
        self.assertIn("fla graph 60.000 ms, train_gdn 70.000: 1.17 times its time", self.report(rows))

    def test_nothing_lost_is_said_only_then(self) -> None:
        text = self.report([check("ours"), check("fla"), timed("ours", "both", 1), timed("fla", "both", 2)])
        self.assertIn("In no row that was measured.", text)

    def test_what_was_not_written_is_ours_to_find(self) -> None:
        wrong = dict(check("fla"), errors={}, wrong="not written: 100% of dq")
        self.assertIn("fla: our script or the peer, not timed: not written: 100% of dq", self.report([check("ours"), wrong]))

    def test_a_table_is_of_one_call_and_the_other_counts_where_it_wins(self) -> None:
        first = [check("flashinfer"), timed("flashinfer", "forward", 0.4), check("fla"), timed("fla", "both", 7)]
        second = [check("ours"), check("flashinfer"), timed("ours", "forward", 0.5), timed("flashinfer", "forward", 0.6)]
        text = self.report(first, second)
        self.assertIn("FlashInfer in call 1 0.400 ms, train_gdn 0.500", text)
        table = text.split("### 8 x 4096")[1]
        self.assertIn(", call 2", table.splitlines()[0])
        self.assertNotIn("7.000", table.split("In another call")[0])

    def test_two_calls_that_timed_train_gdn_have_a_table_each(self) -> None:
        first = [check("ours"), check("fla"), timed("ours", "both", 2), timed("fla", "both", 7)]
        second = [check("ours"), check("flashinfer"), timed("ours", "both", 2.5), timed("flashinfer", "both", 2.4)]
        tables = self.report(first, second).split("### 8 x 4096")[1:]
        self.assertEqual([t.splitlines()[0][-6:] for t in tables], ["call 1", "call 2"])
        self.assertIn("fla 3.50", tables[0])
        self.assertNotIn("fla 2.80", tables[1])

    def test_slower_than_seen_before_is_said(self) -> None:
        self.assertIn("## Slower than seen before", self.report([check("flashinfer"), timed("flashinfer", "forward", 0.6)]))
        self.assertNotIn("Slower than seen before", self.report([check("flashinfer"), timed("flashinfer", "forward", 0.42)]))

    def test_no_such_record(self) -> None:
        done = subprocess.run([sys.executable, str(HERE / "report.py"), "none.jsonl"], capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (1, "report.py: none.jsonl: no such file\n"))

    def test_the_committed_report_is_of_the_committed_records(self) -> None:
        at = HERE.parent / "results" / "peers"
        done = subprocess.run([sys.executable, str(HERE / "report.py"), *map(str, sorted(at.glob("peers_*.jsonl")))],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.stdout, (at / "report.md").read_text())

    def test_off_float64_forbids_a_time(self) -> None:
        import common

        self.assertIsNone(common.verdict(dict(o=1e-3, dq=4e-3)))
        self.assertIn("dq 0.3", common.verdict(dict(o=1e-3, dq=0.3)))
        self.assertIn("dq nan", common.verdict(dict(o=1e-3, dq=float("nan"))))
        self.assertIn("no o", common.verdict(dict(dq=1e-3)))

    def test_the_driver_times_nobody_who_is_wrong(self) -> None:
        import common
        import drive

        class Stub:
            asked: list[tuple[str, str]] = []

            def __init__(self, name: str, *_: object):
                self.name = name

            def ask(self, _seconds: float, do: str, **_: object) -> dict:
                self.asked.append((self.name, do))
                wrong = "off float64" if self.name == "fla" else None
                return dict(about={}, prepare=dict(errors=dict(o=0.1), wrong=wrong, cases=["forward"], eager=[], seconds=0),
                            time=dict(ms=[1.0]), drop={})[do]

            def start(self) -> None: ...
            def stop(self) -> None: ...

        o = mock.Mock(shapes=[SHAPE], peers=["ours", "fla", "jla"], seconds=1e9, rounds=1, runs=1, small=False, what="kernels")
        with mock.patch.object(drive, "Peer", Stub), mock.patch.object(drive, "RECORD") as record, \
                mock.patch.object(drive, "say"), mock.patch.object(common, "WORK", self.folder):
            drive.kernels(o)
        self.assertIn(("jla", "time"), Stub.asked)
        self.assertNotIn(("fla", "time"), Stub.asked)
        self.assertEqual([c.kwargs["peer"] for c in record.add.call_args_list if c.args[0] == "time"], ["ours", "jla"])


@needs_torch
class Workers(unittest.TestCase):
    def test_not_written_is_a_reason_and_no_error_of_the_peer(self) -> None:
        import torch_tools
        import torch

        class Forgetful(torch_tools.Worker):
            def load(self, shape: str):
                return (lambda: dict(o=torch.empty(4), dq=torch.ones(4))), 0.0

        answer = Forgetful().prepare(SHAPE)
        self.assertEqual((answer["wrong"], answer["errors"]), ("not written: 100% of o", {}))


@needs_torch
class TorchTimes(unittest.TestCase):
    def test_table_shows_who_loses(self) -> None:
        import torch_times

        row = dict(shape=SHAPE, case="forward", kind="graph")
        record = dict(device="X", torch="2", date="d", functions=dict(train_gdn="a", fla="b", FlashQLA="c"), rows=[
            dict(row, function="train_gdn", ms=[2.0, 2.0, 9.0]), dict(row, function="fla", ms=[1.0, 1.0, 0.5]),
            dict(row, function="FlashQLA", ms=[], why="dk = 128 alone")])
        self.assertIn("| forward | device, CUDA graph | 2.000 (2.000 to 9.000) | 1.000 (0.500 to 1.000) | 0.50 | dk = 128 alone |  |",
                      torch_times.table(record))

    @unittest.skipUnless((HERE.parents[1] / "libgdn.so").exists(), "libgdn.so is not built")
    def test_wrong_results_and_failures_get_no_time(self) -> None:
        import torch_times

        right = torch_times.ours()[0]

        def fails(*x):
            raise RuntimeError("no kernel for this")
        functions = dict(train_gdn=right, other=lambda q, *x: (1.1 * right(q, *x)[0],), third=fails)
        rows = torch_times.measure("2,70,1,2,16,16", functions, 2, 2, "cpu", 60)
        self.assertEqual([len(row["ms"]) for row in rows], [2, 2, 0, 0, 0, 0])
        self.assertIn("off float64 by more than 0.02: o 0.1", rows[2]["why"])
        self.assertIn("no kernel for this", rows[4]["why"])


if __name__ == "__main__":
    unittest.main()
