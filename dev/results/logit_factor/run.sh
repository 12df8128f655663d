#!/usr/bin/env bash
# AdamW without the factor of the logits, GPT-2's tokens of books: what dev/results/transfer_adamw is to be held against. At
# 17, 31 and 76 s a run (H200, d = 256, 512, 1024): 42 minutes.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
grid="--optimizers adamw --widths 256,512,1024"
sweep factor1 "$grid --params sp,mup --seeds 42 --lrs 5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2" ""
sweep factor1 "$grid --params mup --seeds 42,43 --lrs 2e-3,4e-3,8e-3" ""
sweep factor1_heads_of_64 "$grid --params mup --seeds 42,43 --head_dim 64 --lrs 2e-3,4e-3,8e-3" ""
plot factor1 factor1_heads_of_64
