#!/usr/bin/env bash
# SGD on GPT-2's tokens at d = 1024: mup0 with mup's readout scale s (data.csv), at the learning rate where mup0 ends above
# mup: 2 runs, 150 s. Then mup0 as it is with seed 43, the partner that dev/results lacks (mup0.csv): 76 s.
# READOUT: the option that gives mup0 mup's s.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin books_train_000.bin books_train_001.bin books_val_000.bin -- "$@"
keep_record
for seed in 42 43; do
  sweep data "--optimizers sgd --params mup0 --widths 1024 --lrs 18.1 --seeds $seed" "$GPT2_SGD ${READOUT:--readout mup}"
done
sweep mup0 "--optimizers sgd --params mup0 --widths 1024 --lrs 18.1 --seeds 43" "$GPT2_SGD"
