#!/usr/bin/env bash
# AdamW on GPT-2's tokens at d = 1024 with independent weight decay (lr x decay a step does not fall with the width): 6 runs,
# 460 s.
# Then partner.csv, the same six without it, by the same program: 460 s.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin books_train_000.bin books_train_001.bin books_val_000.bin -- "$@"
keep_record
for seed in 42 43; do
  for lr in 4e-3 8e-3 2e-3; do
    sweep data "--optimizers adamw --params mup --widths 1024 --lrs $lr --seeds $seed" \
      "$GPT2_ADAMW -wd_mode independent"
  done
done
sweep partner "--optimizers adamw --params mup --widths 1024 --lrs 4e-3,8e-3,2e-3 --seeds 42,43" "$GPT2_ADAMW"
