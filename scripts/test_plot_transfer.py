"""Tests of plot_transfer.py's statistics, on losses whose best learning rate and noise are known; no GPU, no packages.

    python3 scripts/test_plot_transfer.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import math
import random
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plot_transfer import (  # noqa: E402
    HEAD,
    Curve,
    Interval,
    Noise,
    estimate_noise,
    evaluate,
    find_minimum,
    interval,
    table,
)

CURVATURE = 0.04  # nats per squared octave, as of AdamW on GPT-2's tokens
LRS = range(-10, -5)  # log2


def truth(x: float, x0: float) -> float:
    return 4 + CURVATURE * (x - x0) ** 2


def measured(rng: random.Random, x0: float, sigma: float, seeds: int, lrs=LRS) -> Curve:
    """A curve of runs with the minimum at x0 = log2(lr) and normal noise."""
    return Curve({s: {2.0**x: truth(x, x0) + rng.gauss(0, sigma) for x in lrs} for s in range(42, 42 + seeds)})


def by_column(figures: list, base: int = 256) -> list[dict[str, str]]:
    lines = table({("adamw", "mup", ""): figures}, base).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(HEAD, row)) for row in rows[2:]]


class Coverage(unittest.TestCase):
    """The interval of 95% holds the true value in 95% of experiments, the bound of the regret in 95% or more."""

    EXPERIMENTS = 300

    def shares(self, base: float, wide: float, sigma: float, base_seeds: int, wide_seeds: int) -> dict[str, float]:
        rng = random.Random(7)
        hits = dict.fromkeys(("best at the base", "best", "shift", "regret"), 0)
        for _ in range(self.EXPERIMENTS):
            panel = {256: measured(rng, base, sigma, base_seeds), 1024: measured(rng, wide, sigma, wide_seeds)}
            of_base, of_wide = evaluate(panel, 256, estimate_noise([panel]), draws=200)
            s = of_wide.spread
            hits["best at the base"] += of_base.spread.best.low <= base <= of_base.spread.best.high
            hits["best"] += s.best.low <= wide <= s.best.high
            hits["shift"] += s.shift.low <= wide - base <= s.shift.high
            hits["regret"] += CURVATURE * (wide - base) ** 2 <= s.regret_bound
        return {name: count / self.EXPERIMENTS for name, count in hits.items()}

    def assert_covers(self, shares: dict[str, float]) -> None:
        error = 3 * math.sqrt(0.95 * 0.05 / self.EXPERIMENTS)  # 0.038
        for name in ("best at the base", "best", "shift"):
            self.assertAlmostEqual(shares[name], 0.95, delta=error, msg=f"{name}: {shares}")
        self.assertGreater(shares["regret"], 0.95 - error, shares)

    def test_two_seeds_everywhere(self) -> None:
        self.assert_covers(self.shares(base=-8.0, wide=-8.3, sigma=0.004, base_seeds=2, wide_seeds=2))

    def test_one_seed_at_the_wide_model(self) -> None:
        self.assert_covers(self.shares(base=-7.9, wide=-8.1, sigma=0.004, base_seeds=3, wide_seeds=1))

    def test_the_deviation_of_two_seeds_would_not_cover(self) -> None:
        """What the intervals replace: +- the deviation of two seeds' shifts holds the truth far too seldom."""
        rng, hits = random.Random(7), 0
        for _ in range(self.EXPERIMENTS):
            panel = {256: measured(rng, -8.0, 0.004, 2), 1024: measured(rng, -8.3, 0.004, 2)}
            wide = evaluate(panel, 256)[1]
            a, b = (own.shift for own in wide.by_seed.values())
            hits += abs(wide.shift + 0.3) <= abs(a - b) / math.sqrt(2)
        self.assertLess(hits / self.EXPERIMENTS, 0.8)


class TheNoise(unittest.TestCase):
    def test_is_found(self) -> None:
        rng = random.Random(1)
        panel = {w: measured(rng, -8, 0.004, 4) for w in range(64)}
        noise = estimate_noise([panel])
        self.assertEqual(noise.freedom, 64 * 3 * 3)
        for sigma in (noise.sigma, noise.far[0] if noise.far else noise.sigma):
            self.assertAlmostEqual(sigma, 0.004, delta=0.0003)

    def test_what_a_seed_changes_everywhere(self) -> None:
        """Counts as noise, unless paired."""
        rng = random.Random(1)
        panel = {w: measured(rng, -8, 0.004, 2) for w in range(64)}
        for curve in panel.values():
            curve.by_seed[43] = {lr: y + 0.02 for lr, y in curve.by_seed[43].items()}
        paired = estimate_noise([panel], paired=True)
        self.assertEqual(paired.freedom, 64 * 2)
        self.assertAlmostEqual(paired.sigma, 0.004, delta=0.0005)
        self.assertAlmostEqual(estimate_noise([panel]).sigma, math.hypot(0.004, 0.02 / math.sqrt(2)), delta=0.001)
        curve = Curve({seed: {2.0**-8: 4 + 0.1 * seed} for seed in (0, 1)})  # one point: nothing is left
        self.assertIsNone(estimate_noise([{256: curve}], paired=True))

    def test_runs_that_panels_share_count_once(self) -> None:
        panel = {256: measured(random.Random(1), -8, 0.004, 2)}
        self.assertEqual(estimate_noise([panel, panel]), estimate_noise([panel]))

    def test_a_larger_noise_above_the_minimum_stays_there(self) -> None:
        rng = random.Random(1)
        panel = {w: measured(rng, -8, 0.004, 2) for w in range(40)}
        for curve in panel.values():
            for losses in curve.by_seed.values():
                losses[2.0**-6] += rng.gauss(0, 0.04)  # 0.16 above the lowest
        noise = estimate_noise([panel])
        self.assertAlmostEqual(noise.sigma, 0.004, delta=0.001)
        self.assertGreater(noise.far[0], 0.02)
        sigma = noise.draw(rng)
        self.assertLess(sigma(0.04), 0.01)
        self.assertGreater(sigma(0.06), 0.02)

    def test_far_losses_do_not_count(self) -> None:
        curve = measured(random.Random(1), -8, 0.0, 2)
        curve.by_seed[43][2.0**-6] += 5
        self.assertEqual(estimate_noise([{256: curve}]).sigma, 0)

    def test_none_with_one_seed_and_then_no_intervals(self) -> None:
        panel = {w: measured(random.Random(1), -8, 0.004, 1) for w in (256, 512)}
        self.assertIsNone(estimate_noise([panel]))
        row = by_column(evaluate(panel, 256, None))[1]
        self.assertNotIn("[", row["best lr"] + row["shift"])
        self.assertEqual(row["P(other lr)"], "-")

    def test_its_own_uncertainty_is_drawn(self) -> None:
        rng = random.Random(1)
        known, estimated = Noise(0.004, math.inf), Noise(0.004, 2.0)
        self.assertEqual({known.draw(rng)(1.0) for _ in range(9)}, {0.004})
        draws = sorted(estimated.draw(rng)(1.0) for _ in range(4001))
        self.assertAlmostEqual(draws[2000], 0.004 / math.sqrt(math.log(2)), delta=0.0003)  # chi squared of 2: median 2 log 2


class NotBracketed(unittest.TestCase):
    """A minimum outside the points is no measurement."""

    def test_no_number_is_given(self) -> None:
        curves = {256: measured(random.Random(1), -8, 0.001, 2), 512: measured(random.Random(2), -11.5, 0.001, 2)}
        row = by_column(evaluate(curves, 256, Noise(0.001, math.inf)))[1]
        self.assertEqual(row["best lr"], "not bracketed [open, open]")
        self.assertEqual((row["shift"].split(" [")[0], row["regret"]), ("not bracketed", "not bracketed (no bound)"))
        self.assertEqual((row["P(regret > 0.01)"], row["within"]), ("1.00", "?"))
        self.assertIn("minimum at the grid's lower edge", row["note"])

    def test_it_is_known_on_which_side(self) -> None:
        curve = measured(random.Random(1), -11.5, 0, 1)
        self.assertEqual(find_minimum(curve.mean()).bracketed_x0(), -math.inf)
        curve = measured(random.Random(1), -4, 0, 1)
        self.assertEqual(find_minimum(curve.mean()).bracketed_x0(), math.inf)

    def test_a_base_that_is_not_bracketed_leaves_no_shift(self) -> None:
        curves = {256: measured(random.Random(1), -4, 0.001, 2), 512: measured(random.Random(2), -8, 0.001, 2)}
        row = by_column(evaluate(curves, 256, Noise(0.001, math.inf)))[1]
        self.assertEqual((row["shift"].split(" [")[0], row["regret"].split(" (")[0], row["within"]),
                         ("not bracketed", "not bracketed", "?"))  # fmt: skip

    def test_regret_outside_the_points(self) -> None:
        rng = random.Random(1)
        curves = {256: measured(rng, -7.2, 0.001, 2), 512: measured(rng, -9, 0.001, 2, range(-11, -7))}
        row = by_column(evaluate(curves, 256, Noise(0.001, math.inf)))[1]
        self.assertEqual(row["regret"], "not measured (no bound)")
        self.assertIn("outside the measured points", row["note"])

    def test_draws_that_are_unknown_widen_both_sides(self) -> None:
        self.assertEqual(interval([1.0] * 94 + [math.nan] * 6), Interval(-math.inf, math.inf))
        self.assertEqual(interval([1.0] * 99 + [math.nan]), Interval(1.0, 1.0))
        self.assertEqual(interval([1.0] * 90 + [math.inf] * 10), Interval(1.0, math.inf))


class Table(unittest.TestCase):
    def test_each_seed_is_printed(self) -> None:
        panel = {
            256: Curve({42: {2.0**x: truth(x, -8) for x in LRS}, 43: {2.0**x: truth(x, -7) for x in LRS}}),
            512: Curve({42: {2.0**x: truth(x, -8.25) for x in LRS}, 43: {2.0**x: truth(x, -7.5) for x in LRS}, 44: {2.0**-8: 4.0}}),
        }  # fmt: skip
        base, wide = by_column(evaluate(panel, 256, None))
        self.assertEqual(base["each seed: grid's best, shift"], "42: 0.00390625; 43: 0.0078125")
        self.assertEqual(wide["each seed: grid's best, shift"], "42: 0.00390625, -0.25; 43: 0.00390625, -0.50")

    def test_probability_that_the_grids_best_is_another(self) -> None:
        def other(base: float, wide: float) -> float:
            panel = {256: measured(random.Random(1), base, 0, 1), 512: measured(random.Random(1), wide, 0, 1)}
            return evaluate(panel, 256, Noise(0.004, math.inf))[1].spread.other_lr

        self.assertLess(other(-8.0, -8.0), 0.01)
        self.assertAlmostEqual(other(-7.5, -8.0), 0.5, delta=0.05)
        self.assertGreater(other(-7.0, -8.0), 0.99)

    def test_within_needs_the_interval_not_the_point(self) -> None:
        def answer(wide: float, sigma: float) -> str:
            panel = {256: measured(random.Random(1), -8, 0, 1), 512: measured(random.Random(1), wide, 0, 1)}
            return by_column(evaluate(panel, 256, Noise(sigma, math.inf)))[1]["within"]

        self.assertEqual([answer(-8.1, 0.001), answer(-8.1, 0.02), answer(-9, 0.001)], ["yes", "?", "no"])


if __name__ == "__main__":
    unittest.main()
