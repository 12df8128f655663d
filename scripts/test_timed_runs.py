"""Tests of the scripts that make the open runs of transfer within a time limit (dev/results/*/run.sh, select_constants.py), with
a trainer that takes no time; no GPU, no packages.

    python3 scripts/test_timed_runs.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "dev" / "results"

# Its loss depends on the learning rate and on every constant that the rule tries, the same for the same options.
FAKE = f"""#!{sys.executable}
import math, os, random, sys
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = o.pop("-o")
os.makedirs(folder, exist_ok=True)
random.seed(str(sorted(o.items())))
best = 4 if o["-opt"] == "sgd" else -8
loss = 4 + (math.log2(float(o["-lr"])) - best) ** 2 / 100 + random.gauss(0, 0.003)
loss -= 0.2 * (o.get("-clip") == "0.25") + 0.1 * ("hidden=2" in o.get("-init_of", "")) + 0.05 * ("embedding=0.0625" in o.get("-lr_of", ""))
with open(os.path.join(folder, "log.csv"), "w") as log:
    log.write("step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\\n")
    for step in range(1, int(o["-n"]) + 1):
        log.write(f"{{step}},train,9,0.1,1.5,2.0,1000,0.1\\n")
    log.write(f"{{step}},val,{{loss}},,,,,\\n")
"""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


class WithFake(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.fake = self.folder / "train_gdn"
        self.fake.write_text(FAKE)
        self.fake.chmod(0o755)
        for name in ("books_train_000.bin", "books_train_001.bin", "books_val_000.bin"):
            (self.folder / name).touch()

    def call(self, script: Path, out: str, *seconds: object) -> subprocess.CompletedProcess:
        words = [script, self.fake, self.folder, self.folder / out, *seconds]
        environment = {**os.environ, "COMMIT": "1234567", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=environment, timeout=300)

    def without_data(self, name: str) -> Path:
        """A copy of dev/results/NAME in a checkout of its own, without its CSVs."""
        root = self.folder / "checkout"
        copy = root / "dev" / "results" / name
        shutil.copytree(RESULTS / name, copy, ignore=shutil.ignore_patterns("*.csv", "*.tar.gz", "*.tar.xz"))
        shutil.copy(RESULTS / "common.sh", copy.parent)
        if not (root / "scripts").exists():
            (root / "scripts").symlink_to(RESULTS.parent.parent / "scripts")
        return copy

    def longer(self, out: str) -> None:
        """Makes a CSV's runs as long as on an H200, so that a limit cuts."""
        path = self.folder / out / "data.csv"
        rows = rows_of(path)
        for row in rows:
            row["seconds"] = {"256": "17", "512": "31", "1024": "76", "2048": "222"}[row["width"]]
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


class TimedRuns(WithFake):
    def test_a_list_of_sweeps_goes_on_where_the_time_was_up(self) -> None:
        script = self.without_data("adamw_seeds") / "run.sh"
        done = self.call(script, "out", 60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("2 left (--minutes", done.stdout)
        self.assertEqual({row["width"] for row in rows_of(self.folder / "out" / "data.csv")}, {"256"})
        self.longer("out")
        done = self.call(script, "out", 90)
        self.assertEqual(len(rows_of(self.folder / "out" / "data.csv")), 13)  # all fit one by one, the fake takes no time
        self.assertNotIn(" left (--minutes", self.call(script, "out", 90).stdout)
        readme = (self.folder / "out" / "README.md").read_text()
        self.assertIn("Commit: 1234567.", readme)
        self.assertNotIn("@", readme)
        self.assertEqual(sorted(p.name for p in (self.folder / "out").iterdir()), ["README.md", "data.csv", "runs.tar.gz"])

    def test_runs_that_are_on_record_are_not_made_again(self) -> None:
        """From the data.csv beside run.sh, where OUT has none."""
        folder = self.without_data("adamw_seeds")
        (folder / "data.csv").write_bytes((RESULTS / "adamw_seeds" / "data.csv").read_bytes())
        recorded = rows_of(folder / "data.csv")
        self.assertEqual(self.call(folder / "run.sh", "out").returncode, 0)
        rows = rows_of(self.folder / "out" / "data.csv")
        self.assertEqual(len(rows), 13)
        self.assertEqual(rows[: len(recorded)], recorded)

    def test_every_list_names_its_runs(self) -> None:
        lists = {"embedding_exponent": (6, "partner", 6), "decay_form": (6, "partner", 6), "mup0_with_s": (2, "mup0", 1)}
        for name, (runs, beside, runs_beside) in lists.items():
            done = self.call(self.without_data(name) / "run.sh", name)
            self.assertEqual(done.returncode, 0, done.stderr)
            for file, count in (("data", runs), (beside, runs_beside)):
                rows = rows_of(self.folder / name / f"{file}.csv")
                self.assertEqual({row["status"] for row in rows}, {"ok"})
                self.assertEqual(len(rows), count)
            self.assertRegex(done.stdout.strip().splitlines()[-1], rf"^{name}: \d+ s$")

    def test_errors_are_one_line(self) -> None:
        (self.folder / "books_val_000.bin").unlink()
        for script in ("adamw_seeds/run.sh", "sgd_frozen/select_constants.py"):
            done = self.call(RESULTS / script, "out")
            self.assertEqual((done.returncode, len(done.stderr.strip().splitlines())), (1, 1), done.stderr)
            self.assertIn("books_val_000.bin: no such file", done.stderr)


class TheRule(WithFake):
    """dev/results/sgd_frozen/RULE.md."""

    script = RESULTS / "sgd_frozen" / "select_constants.py"

    def module(self):
        spec = importlib.util.spec_from_file_location("select_constants", self.script)
        module = importlib.util.module_from_spec(spec)
        sys.modules["select_constants"] = module  # dataclasses look it up
        spec.loader.exec_module(module)
        return module

    def test_calls_that_are_cut_off_choose_what_one_call_does(self) -> None:
        script = self.without_data("sgd_frozen") / "select_constants.py"
        done = self.call(script, "whole")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("all done", done.stdout)
        rows = rows_of(self.folder / "whole" / "data.csv")
        self.assertEqual([sum(row["width"] == w for row in rows) for w in ("256", "512", "1024", "2048")], [28, 3, 3, 1])
        self.assertIn("Frozen, after 28 runs at d = 256", (self.folder / "whole" / "report.md").read_text())
        self.assertIn("-clip 0.25 -warmup 100 -init_of hidden=2 -lr_of embedding=0.0625", done.stdout)
        self.assertIn("runs are left", self.call(script, "cut", 20).stdout)
        path = self.folder / "cut" / "data.csv"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))  # as if nine runs had ended
        for limit in (20, 80, 230, 300):
            self.assertEqual(self.call(script, "cut", limit).returncode, 0)
            self.longer("cut")
        self.assertEqual(len(rows_of(self.folder / "cut" / "data.csv")), 35)
        report = [(self.folder / out / "report.md").read_text() for out in ("whole", "cut")]
        self.assertEqual(report[0], report[1])

    def test_the_record_is_what_the_rule_says_of_its_runs(self) -> None:
        done = self.call(self.script, "record")  # walks the rule on data.csv beside it, training nothing
        self.assertIn("all done", done.stdout)
        self.assertEqual((self.folder / "record" / "report.md").read_text(), (self.script.parent / "report.md").read_text())

    def test_ties_go_to_the_default(self) -> None:
        choose = self.module().choose
        self.assertEqual(choose([4.0, 3.9951], 0.005), 0)
        self.assertEqual(choose([4.0, 3.99, 3.9899], 0.005), 1)
        self.assertEqual(choose([4.0, 3.9, math.inf], 0.005), 1)
        self.assertEqual(choose([math.inf, math.inf], 0.005), 0)
        self.assertEqual(choose([4.0, 4.0, 3.9999], 0), 2)

    def test_learning_rates_that_go_along(self) -> None:
        m = self.module()
        start = m.Constants()
        self.assertEqual([round(c.lr * c.clip, 9) for c in m.candidates(2, start)], [0.3, 0.3])
        self.assertEqual([c.lr for c in m.candidates(4, start)], [0.3, 0.6, 1.2])
        self.assertEqual([round(c.lr / (1 - c.mom), 9) for c in m.candidates(7, start)], [3.0, 3.0])
        runs = 2 * (1 + sum(len(m.candidates(step, start)) - 1 for step in range(1, m.LAST_STEP + 1)))
        self.assertEqual(runs, m.BUDGET)


if __name__ == "__main__":
    unittest.main()
