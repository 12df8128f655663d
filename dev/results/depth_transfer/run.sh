#!/usr/bin/env bash
# AdamW on GPT-2's tokens at d = 256 over depths 4, 8 (the base), 16 and 32, 500 steps: depth's alpha off, 1/2 and 1.
# 33 runs, about 560 s: at L = 8, where all alphas are one network, two seeds; elsewhere seed 42.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin books_train_000.bin books_train_001.bin books_val_000.bin -- "$@"
keep_record
SCHEDULE=(-n 500 -warmup 50 -L0 8)
grid="--optimizers adamw --params mup --widths 256 --lrs 4e-3,8e-3,2e-3"
depth() { # NAME ALPHA L SECONDS-OF-A-RUN SEEDS
  EXPECT="256=$4"
  sweep "$1" "$grid --seeds $5" "$GPT2_ADAMW -depth_alpha $2 -L $3"
}
depth base 1 8 9 42,43
for name in one off half; do
  case $name in one) alpha=1 ;; off) alpha=off ;; half) alpha=1/2 ;; esac
  depth "${name}_32" "$alpha" 32 34 42
  depth "${name}_4" "$alpha" 4 6 42
  depth "${name}_16" "$alpha" 16 18 42
done
[ -n "${DRY_RUN:-}" ] || "$PYTHON" "$HERE/depth_table.py" "$OUT" "$OUT/data.csv" "$OUT/table.md"
