#!/usr/bin/env bash
# AdamW on GPT-2's tokens: is 4e-3 the best learning rate at d = 256, and at 1024, of other seeds too? 13 runs, 460 s.
# First the pair of learning rates that decides, at both widths and for both seeds, then the base's curve around it.
. "$(dirname "$0")/../../timed_sweeps.sh"
begin "$@"
BASE="--optimizers adamw --params mup" CONSTANTS="-warmup 100 -logit_factor 4"
for seed in 44 45; do
  sweep "$BASE --widths 256 --lrs 4e-3,8e-3 --seeds $seed" "$CONSTANTS"
  sweep "$BASE --widths 1024 --lrs 4e-3,8e-3 --seeds $seed" "$CONSTANTS"
  sweep "$BASE --widths 256 --lrs 2e-3,1.6e-2 --seeds $seed" "$CONSTANTS"
done
sweep "$BASE --widths 256 --lrs 1.6e-2 --seeds 43" "$CONSTANTS"
