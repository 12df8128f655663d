#!/usr/bin/env bash
# AdamW on GPT-2's tokens at d = 1024, the embedding's learning rate multiplied by (1024 / 256)^-1/2 = 1/2: 6 runs, 460 s.
. "$(dirname "$0")/../../timed_sweeps.sh"
begin "$@"
for seed in 42 43; do
  for lr in 4e-3 8e-3 2e-3; do
    sweep "--optimizers adamw --params mup --widths 1024 --lrs $lr --seeds $seed" \
      "-warmup 100 -logit_factor 4 -lr_of embedding=0.5"
  done
done
