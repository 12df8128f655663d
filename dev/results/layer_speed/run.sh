#!/usr/bin/env bash
# Every other kernel on one GPU at d = 256, 1024 and 2048. The benchmark is dev/bench_layers beside TRAIN_GDN (make
# dev/bench_layers); DATA is not read.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin -- "$@"
bench=$(dirname "$TRAIN_GDN")/dev/bench_layers
[ -x "$bench" ] || { echo "run.sh: $bench: no such program; make dev/bench_layers" >&2; exit 1; }
for width in 256 1024 2048; do "$bench" -d $width | tee "$OUT/d$width.txt"; done
