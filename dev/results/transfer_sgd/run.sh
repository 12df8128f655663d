#!/usr/bin/env bash
# SGD's best learning rate over the width, GPT-2's tokens of books: mup, mup0 and sp. At 17, 31 and 76 s a run (H200, d = 256,
# 512, 1024): 42 minutes.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
sgd="--optimizers sgd --seeds 42,43 --widths 256,512,1024"
sweep sgd "$sgd --params mup --lrs 12.8,18.1,25.6" "$GPT2_SGD"
sweep sgd "$sgd --params mup0,sp --lrs 9.05,12.8,18.1,25.6" "$GPT2_SGD"
plot sgd
