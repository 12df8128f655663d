#!/usr/bin/env bash
# SGD on GPT-2's tokens at d = 1024: mup0 with mup's readout scale s (data.csv), at the learning rate where mup0 ends above
# mup: 2 runs, 150 s. Then mup0 as it is with seed 43, the partner that dev/results lacks (mup0.csv): 76 s.
# READOUT: the option that gives mup0 mup's s.
. "$(dirname "$0")/../../timed_sweeps.sh"
begin "$@"
CONSTANTS="-warmup 500 -mom 0.95 -clip 0.25 -logit_factor 4 -init_of hidden=4
  -lr_of embedding=0.0625,conv=0.25,gain=0.25,output_gain=0.25"
for seed in 42 43; do
  sweep "--optimizers sgd --params mup0 --widths 1024 --lrs 18.1 --seeds $seed" "$CONSTANTS ${READOUT:--readout mup}"
done
sweep "--optimizers sgd --params mup0 --widths 1024 --lrs 18.1 --seeds 43" "$CONSTANTS" mup0
