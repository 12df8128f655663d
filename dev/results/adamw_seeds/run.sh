#!/usr/bin/env bash
# AdamW on GPT-2's tokens: is 4e-3 the best learning rate at d = 256, and at 1024, of other seeds too? 13 runs, 460 s.
# First the pair of learning rates that decides, at both widths and for both seeds, then the base's curve around it.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin books_train_000.bin books_train_001.bin books_val_000.bin -- "$@"
keep_record
adamw="--optimizers adamw --params mup"
for seed in 44 45; do
  sweep data "$adamw --widths 256 --lrs 4e-3,8e-3 --seeds $seed" "$GPT2_ADAMW"
  sweep data "$adamw --widths 1024 --lrs 4e-3,8e-3 --seeds $seed" "$GPT2_ADAMW"
  sweep data "$adamw --widths 256 --lrs 2e-3,1.6e-2 --seeds $seed" "$GPT2_ADAMW"
done
sweep data "$adamw --widths 256 --lrs 1.6e-2 --seeds 43" "$GPT2_ADAMW"
