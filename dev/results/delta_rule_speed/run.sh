#!/usr/bin/env bash
# The gated delta rule's kernels on one GPU. The benchmark is dev/bench_delta_rule beside TRAIN_GDN (make
# dev/bench_delta_rule); DATA is not read.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin -- "$@"
bench=$(dirname "$TRAIN_GDN")/dev/bench_delta_rule
[ -x "$bench" ] || { echo "run.sh: $bench: no such program; make dev/bench_delta_rule" >&2; exit 1; }
for shape in "32 1024 6 6 32 64" "32 1024 6 6 64 128" "32 1024 6 6 96 192" "32 1024 6 6 128 256" "8 4096 16 32 128 128" \
  "1 32768 6 6 128 256" "32 1024 6 6 192 384" "8 1024 6 6 256 512"; do
  # shellcheck disable=SC2086
  "$bench" 30 $shape
done | tee "$OUT/delta_rule.txt"
