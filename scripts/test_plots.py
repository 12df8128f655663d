"""Tests of the plots: plot_transfer.py, plot_log.py, plot_step.py; skipped where matplotlib is missing.

    python3 scripts/test_plots.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import json
import subprocess
import unittest
from pathlib import Path

from plot_transfer import Curve, evaluate, find_minimum
from testing import InFolder, call, needs_matplotlib

OPTIONS = "-B 64 -L 8 -T 512 -heads 6 -min_lr lr/20 -n 1000 -warmup 100"


def parabola(x0: float, a: float, c: float, xs: range) -> dict[float, float]:
    return {2.0**x: c + a * (x - x0) ** 2 for x in xs}


class Minima(unittest.TestCase):
    def test_parabola(self) -> None:
        m = find_minimum(parabola(-8.3, 0.04, 4.0, range(-11, -5)))
        self.assertAlmostEqual(m.x0, -8.3)
        self.assertAlmostEqual(m.c, 4.0)
        self.assertAlmostEqual(m.loss(-7.3), 4.04)
        self.assertEqual((m.note, m.bracketed), ("", True))

    def test_three_points_by_hand(self) -> None:
        # y = 1, 0, 3 at x = -1, 0, 1: a = 2, slope 1 at 0, so x0 = -1/4 and c = -1/8; x = 2 is not used.
        m = find_minimum({0.5: 1.0, 1.0: 0.0, 2.0: 3.0, 4.0: 50.0})
        self.assertAlmostEqual(m.x0, -0.25)
        self.assertAlmostEqual(m.c, -0.125)

    def test_edges(self) -> None:
        self.assertIn("lower edge", find_minimum(parabola(-11.2, 0.1, 4, range(-11, -5))).note)
        self.assertIn("upper edge", find_minimum(parabola(-5, 0.1, 4, range(-11, -5))).note)
        self.assertIn("diverged lr", find_minimum(parabola(-6, 0.1, 4, range(-11, -5)), {2.0**-5}).note)
        straight = find_minimum({1.0: 3.0, 2.0: 2.0, 4.0: 1.0})
        self.assertIsNone(straight.a)
        self.assertEqual(straight.x0, 2)
        self.assertFalse(straight.bracketed)

    def test_a_loss_far_above(self) -> None:
        # beyond what can be trained: the parabola is drawn, but shift and regret are not to be trusted
        far = find_minimum({6.4: 4.565, 12.8: 4.454, 25.6: 6.495, 51.2: 21.0})
        self.assertEqual(far.note, "parabola through a loss 2.0 above the lowest")
        self.assertFalse(far.bracketed)
        self.assertTrue(find_minimum({6.4: 4.565, 12.8: 4.454, 25.6: 4.9, 51.2: 21.0}).bracketed)

    def test_points_that_are_not_neighbours(self) -> None:
        losses = {1.0: 1.2, 2.0: 0.9, 4.0: 1.2, 8.0: 1.1, 16.0: 2.0}  # 4 is high, or 8 low
        m = find_minimum(losses)
        self.assertIn("not neighbours", m.note)
        self.assertAlmostEqual(m.x0, 1)
        losses[1.0] = 0.8  # now the lowest is at the edge
        self.assertIn("lower edge", find_minimum(losses).note)
        self.assertAlmostEqual(find_minimum({1.0: 1.5, 2.0: 0.8, 4.0: 1.5, 8.0: 1.1, 16.0: 0.7}).x0, 4)

    def test_lowest_points_on_one_side(self) -> None:
        losses = {1.0: 2.0, 2.0: 0.50, 4.0: 0.515, 8.0: 0.54}  # through the last three the minimum is at 2^0
        m = find_minimum(losses)
        self.assertIn("on one side", m.note)
        self.assertAlmostEqual(m.x0, 1.4901, 4)  # 1 + (1.50 - 0.015) / (2 (1.50 + 0.015))
        # A loss beyond the edge of what can be trained bends no parabola: the three lowest points have one of their own.
        cliff = find_minimum({0.5: 1.28, 1.0: 1.245, 2.0: 1.242, 4.0: 2.1})
        self.assertEqual(cliff.note, "")
        self.assertAlmostEqual(cliff.x0, 0.59375)  # 1/2 + 0.003 / (0.035 - 0.003)
        self.assertGreater(cliff.c, 1.239)

    def test_shift_and_regret(self) -> None:
        xs = range(-11, -4)
        base, wide = parabola(-8.0, 0.04, 4.0, xs), parabola(-8.5, 0.08, 3.0, xs)
        panel = {
            256: Curve({1: base, 2: {lr: y + 0.2 for lr, y in base.items()}}),
            512: Curve({1: wide, 2: wide}),
        }
        of_base, of_wide = evaluate(panel, 256)
        self.assertAlmostEqual(of_base.minimum.c, 4.1)
        self.assertEqual((of_base.shift, of_base.regret), (0, 0))
        self.assertAlmostEqual(of_wide.shift, -0.5)
        for own in of_wide.by_seed.values():
            self.assertAlmostEqual(own.shift, -0.5)
        self.assertAlmostEqual(of_wide.regret, 0.08 * 0.25)
        self.assertAlmostEqual(of_wide.grid_regret, 0)  # x = -8 and -9 are as good

    def test_a_seed_with_some_of_the_points_bends_nothing(self) -> None:
        full = parabola(-8.3, 0.04, 4.0, range(-11, -5))
        some = {lr: y + 0.3 for lr, y in full.items() if 2.0**-9 <= lr <= 2.0**-7}
        m = find_minimum(Curve({1: full, 2: some}).mean())
        self.assertAlmostEqual(m.x0, -8.3)
        self.assertAlmostEqual(m.c, 4.15)

    def test_a_learning_rate_that_is_too_high_says_nothing_of_the_difference_between_seeds(self) -> None:
        full = parabola(-8.3, 0.04, 4.0, range(-11, -5))
        some = {lr: full[lr] for lr in (2.0**-9, 2.0**-8)} | {2.0**-5: 4.7}
        m = find_minimum(Curve({1: full | {2.0**-5: 7.0}, 2: some}).mean())
        self.assertAlmostEqual(m.x0, -8.3)
        self.assertAlmostEqual(m.c, 4.0)


class Plots(InFolder):
    def write(
        self, name: str, x0: dict[int, float], diverged: float = 1e9, param: str = "mup", lrs=range(-11, -5)
    ) -> Path:
        path = self.folder / name
        with path.open("w") as f:
            f.write("param,optimizer,width,lr,seed,val_loss,status,options\n")
            for width, best in x0.items():
                for lr, loss in parabola(best, 0.04, 4.0, lrs).items():
                    for seed, noise in ((1, 0.0001), (2, -0.0001)):
                        ending = (
                            f",diverged,{OPTIONS}" if lr >= diverged else f"{loss + noise:.9f},ok,{OPTIONS}"
                        )
                        f.write(f"{param},adamw,{width},{lr!r},{seed},{ending}\n")
        return path

    def plot(self, *arguments: object) -> subprocess.CompletedProcess:
        return call(
            "plot_transfer.py", *arguments, "--out", self.folder / "plot", "--table", self.folder / "table.md"
        )

    def assert_drawn(self, name: str) -> None:
        self.assertEqual((self.folder / f"{name}.png").read_bytes()[:4], b"\x89PNG")
        self.assertGreater((self.folder / f"{name}.png").stat().st_size, 5000)
        self.assertIn("<svg", (self.folder / f"{name}.svg").read_text())

    @needs_matplotlib
    def test_plot_and_table(self) -> None:
        mup = self.write("mup.csv", {256: -8.0, 512: -8.25})
        sp = self.write("sp.csv", {256: -8.0, 512: -10.0}, diverged=2.0**-7, param="sp")
        done = self.plot(mup, sp)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assert_drawn("plot")
        table = (self.folder / "table.md").read_text()
        self.assertIn(table, done.stdout)
        cells = [[c.strip() for c in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("|")]
        by_name = {(c[0], c[1]): dict(zip(cells[0], c)) for c in cells}
        mup, sp = by_name["AdamW, muP", "512"], by_name["AdamW, SP", "512"]
        self.assertRegex(mup["shift"], r"^-0\.25 \[-0\.2[5-7], -0\.2[3-5]\]$")
        self.assertRegex(mup["regret"], r"^0\.0025 \(< 0\.002[5-9]\)$")
        self.assertEqual((mup["regret on the grid"], mup["within"]), ("0.0000", "yes"))
        self.assertRegex(sp["shift"], r"^-2\.00 \[open, -1\.9\d\]$")  # the base's best is the last that did not diverge
        self.assertEqual((sp["regret"][:6], sp["regret on the grid"], sp["within"]), ("0.1600", "0.1600", "no"))
        self.assertEqual(by_name["AdamW, SP", "256"]["shift"], "base")
        self.assertRegex(table, r"\nAdamW: noise of one run 0\.0001 \(\d+ degrees of freedom\)\.\n$")

    @needs_matplotlib
    def test_noise_from_outside(self) -> None:
        path = self.write("a.csv", {256: -8.0, 512: -8.25})
        done = self.plot(path, "--noise", 0.01, "--draws", 200)
        self.assertIn("AdamW: noise of one run 0.0100.", done.stdout)
        self.assert_one_line_error(self.plot(path, "--noise", 0), "--noise 0")
        self.assert_one_line_error(self.plot(path, "--draws", 9), "--draws 9")

    @needs_matplotlib
    def test_minimum_at_the_edge_is_said(self) -> None:
        done = self.plot(self.write("a.csv", {256: -8.0, 512: -11.3}))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("minimum at the grid's lower edge", done.stdout)
        self.assertIn("| ?", done.stdout)

    @needs_matplotlib
    def test_a_width_with_too_few_points(self) -> None:
        path = self.write("a.csv", {256: -8.0, 512: -8.0})
        spot = self.write("b.csv", {1024: -8.0, 2048: -8.0}, lrs=range(-9, -7), diverged=2.0**-8)
        self.assert_one_line_error(self.plot(path, spot), "too few points", "width 1024 has 1")
        self.assert_drawn("plot")

    @needs_matplotlib
    def test_plot_log(self) -> None:
        for name in ("one", "two"):
            (self.folder / name).mkdir()
            steps = "".join(f"{i},train,{6 / i},0.1,1.5,2,1000,0.1\n" for i in range(1, 101))
            log = "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\n" + steps + "100,val,0.07,,,,,\n101,trai"
            (self.folder / name / "log.csv").write_text(log)
        done = call(
            "plot_log.py", self.folder / "one", self.folder / "two" / "log.csv", "--out", self.folder / "log"
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assert_drawn("log")

    def test_errors_of_plot_transfer(self) -> None:
        good = self.write("good.csv", {256: -8.0, 512: -8.0})
        self.assert_one_line_error(self.plot(self.folder / "none.csv"), "none.csv: no such file")
        self.assert_one_line_error(self.plot(self.folder), "folder")
        self.assert_one_line_error(self.plot(good, good), "second row")
        self.assert_one_line_error(
            self.plot(self.write("b.csv", {512: -8.0})), "no runs at the base width 256"
        )
        self.assert_one_line_error(
            self.plot(self.write("c.csv", {256: -8.0}, lrs=range(-9, -7))), "too few points"
        )
        for text, words in (
            ("a,b\n1,2\n", "no column param"),
            (good.read_text().splitlines()[0] + "\n", "no rows"),
            (good.read_text().replace("4.", "four ", 1), "expected a number"),
            (good.read_text().replace(",ok,", ",maybe,", 1), "status 'maybe'"),
            (good.read_text().replace("-L 8", "-L 4", 1), "do not belong in one plot"),
            (good.read_text().replace(",ok,", ",", 1), "number of fields"),
        ):
            (self.folder / "bad.csv").write_text(text)
            self.assert_one_line_error(self.plot(self.folder / "bad.csv"), "bad.csv", words)

    def test_errors_of_plot_log(self) -> None:
        self.assert_one_line_error(call("plot_log.py", self.folder / "none"), "no such file")
        (self.folder / "log.csv").write_text("step,loss\n1,2\n")
        self.assert_one_line_error(call("plot_log.py", self.folder), "no column split")
        (self.folder / "log.csv").write_text("step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\n")
        self.assert_one_line_error(call("plot_log.py", self.folder), "no training steps")

    def trace(self, kernels: bool) -> dict:
        """As of dev/bench_step -trace: two layers whose norm, product and delta rule take 1, 4 and 2 ms, and so on."""
        ranges, launched, now = [], [], 0

        def add(path: str, layer: int | None, *inside) -> None:
            nonlocal now
            event = {"ph": "X", "cat": "range", "name": path.split(" / ")[-1], "ts": now, "args": {"path": path}}
            if layer is not None:
                event["args"]["layer"] = layer
            ranges.append(event)
            for name, content in inside:
                if isinstance(content, int):
                    ranges.append({**event, "name": name, "ts": now, "dur": 1000 * content, "args": {**event["args"], "path": f"{path} / {name}"}})
                    launched.append({**ranges[-1], "cat": "kernel", "name": "k", "args": {**event["args"], "path": f"{path} / {name} / k"}})
                    now += 1000 * content
                else:
                    add(f"{path} / {name}", layer if name != "mixer forward" else content[0], *content[1:])
            event["dur"] = now - event["ts"]
            if path.endswith("mixer forward"):
                event["name"] += f" {layer}"

        def mixer(layer: int) -> tuple:
            return "mixer forward", [layer, ("rmsnorm_forward", 1), ("linear_forward", 4), ("gated delta rule", 2)]

        forward = "forward", [None, ("embedding_forward", 1), mixer(0), mixer(1)]
        classifier = "classifier", [None, ("linear_forward", 3), ("softmax_cross_entropy", 2)]
        update = "update", [None, ("optimizer", [None, ("global_norm", 1), ("adamw_update", 2)])]
        add("training step", None, ("zero gradients", 1), ("micro-batch", [None, forward, classifier]), update)
        ranges[0]["dur"] += 1000
        about = {"device": "GPU", "source": "CUPTI", "width": 64, "layers": 2, "batch": 4, "length": 8, "graph_ms": 24.5}
        return {"otherData": about, "traceEvents": [{"ph": "M", "name": "thread_name"}, *ranges, *(launched if kernels else [])]}

    @needs_matplotlib
    def test_plot_step(self) -> None:
        for kernels, rest in ((True, "between kernels"), (False, "outside of these")):
            (self.folder / "step.json").write_text(json.dumps(self.trace(kernels)))
            done = call("plot_step.py", self.folder / "step.json", "-o", self.folder / "step.png")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assert_drawn("step")
            lines = [line.split(None, 2) for line in done.stdout.splitlines() if not line.startswith("wrote")]
            self.assertEqual(lines[0][2], "of 25.00 ms")
            wanted = {
                "matrix products": 8, "gated delta rule": 4, "norms, convolution, gates, embedding": 3, "classifier": 5,
                "optimizer": 3, "copies and zeros": 1, rest: 1,
            }  # fmt: skip
            self.assertEqual({kind: (float(ms), float(share)) for ms, share, kind in lines[1:]},
                             {kind: (ms, 4.0 * ms) for kind, ms in wanted.items()})  # fmt: skip
            drawn = (self.folder / "step.svg").read_text()
            for text in ("25.00 ms launch by launch, 24.50 ms as CUDA graphs", "layer 1, forward: 7.00 ms", "gated delta rule: 4.00 ms, 16.0%"):
                self.assertIn(text, drawn)

    def test_errors_of_plot_step(self) -> None:
        def draw(trace: object, *words: object) -> subprocess.CompletedProcess:
            path = self.folder / "bad.json"
            path.write_text(trace if isinstance(trace, str) else json.dumps(trace))
            return call("plot_step.py", path, "-o", self.folder / "step", *words)

        self.assert_one_line_error(call("plot_step.py", self.folder / "none.json"), "none.json: no such file")
        self.assert_one_line_error(call("plot_step.py", self.folder), "is a folder")
        self.assert_one_line_error(draw("step,loss"), "bad.json: not JSON")
        self.assert_one_line_error(draw("[]"), "bad.json: has no otherData")
        good = self.trace(True)
        self.assert_one_line_error(draw(good, "--layer", 2), "--layer 2: expected 0 to 1")
        self.assert_one_line_error(draw({**good, "otherData": {**good["otherData"], "width": "d"}}), "otherData.width is 'd'")
        self.assert_one_line_error(draw({**good, "traceEvents": [{"ph": "X", "name": "a", "cat": "range"}]}), "event 0", "args")
        self.assert_one_line_error(draw({**good, "traceEvents": good["traceEvents"][2:]}), "has 0 ranges 'training step'")
        no_layers = [e for e in good["traceEvents"] if "layer" not in e.get("args", {})]
        self.assert_one_line_error(draw({**good, "traceEvents": no_layers}), "no ranges of layers")
        wrong = json.loads(json.dumps(good).replace('"ts": 1000,', '"ts": "soon",'))
        self.assert_one_line_error(draw(wrong), "bad.json: event", "TypeError")

    def test_missing_package_is_named(self) -> None:
        (self.folder / "matplotlib.py").write_text("raise ImportError('none', name='matplotlib')\n")
        good = self.write("good.csv", {256: -8.0})
        done = call("plot_transfer.py", good, "--out", self.folder / "plot", PYTHONPATH=str(self.folder))
        self.assert_one_line_error(done, "needs the package matplotlib", "requirements.txt")

    def test_help(self) -> None:
        for script in ("sweep.py", "coord_check.py", "plot_transfer.py", "plot_log.py", "plot_step.py", "follow_log.py", "tokenize_text.py",
                       "detokenize.py", "export_hf.py"):  # fmt: skip
            done = call(script, "-h")
            self.assertEqual(done.returncode, 0)
            self.assertIn("python3 scripts/" + script, done.stdout)


if __name__ == "__main__":
    unittest.main()
