#!/usr/bin/env bash
# The training step's time, memory and share of speed-of-light on one GPU over the widths, with -recompute, by phase. The
# benchmarks are dev/bench_step beside TRAIN_GDN (make dev/bench_step); DATA is not read.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin -- "$@"
bench=$(dirname "$TRAIN_GDN")/dev/bench_step
[ -x "$bench" ] || { echo "run.sh: $bench: no such program; make dev/bench_step" >&2; exit 1; }
{ "$bench" && "$bench" -d 1024 -recompute 1 && "$bench" -d 1024 -recompute 2; } | tee "$OUT/steps.txt"
"$bench" -d 1024 -phases -trace "$OUT/step.json" | tee "$OUT/phases.txt"
"$PYTHON" "$ROOT/scripts/plot_step.py" "$OUT/step.json" --out "$OUT/step"
rm "$OUT/step.json"
