#!/usr/bin/env bash
# SGD's constants of the base with GPT-2's tokens, the three sweeps that led to those of dev/results/transfer_sgd: hidden weights
# of twice the std; the same with gains and taps at a quarter; of four times the std. At 17, 31 and 76 s a run
# (H200, d = 256, 512, 1024) 12 minutes each.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
grid="--optimizers sgd --params mup --widths 256,512,1024 --seeds 42,43 --lrs 6.4,12.8,25.6"
sgd="-warmup 500 -mom 0.95 -clip 0.25 -logit_factor 4"
sweep gpt2_hidden2_sweep "$grid" "$sgd -init_of hidden=2 -lr_of embedding=0.0625"
sweep gpt2_slow_gains_sweep "$grid" "$sgd -init_of hidden=2 -lr_of embedding=0.0625,conv=0.25,gain=0.25,output_gain=0.25"
sweep gpt2_hidden4_sweep "$grid" "$sgd -init_of hidden=4 -lr_of embedding=0.0625"
plot gpt2_hidden2_sweep gpt2_slow_gains_sweep gpt2_hidden4_sweep
