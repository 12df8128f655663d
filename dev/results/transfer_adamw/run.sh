#!/usr/bin/env bash
# AdamW's best learning rate over the width, GPT-2's tokens of books: muP with fixed heads to d = 2048, sp beside it, muP with
# heads of 64. At 17, 31, 76 and 222 s a run (H200, d = 256 to 2048): adamw 51 minutes, heads_of_64 12.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
adamw="--optimizers adamw --seeds 42,43"
sweep adamw "$adamw --params mup --widths 256,1024 --lrs 2e-3,4e-3,8e-3" "$GPT2_ADAMW"
sweep adamw "$adamw --params mup --widths 256,512,1024,2048 --lrs 2e-3,4e-3,8e-3" "$GPT2_ADAMW"
sweep adamw "$adamw --params sp --widths 256,512,1024 --lrs 1e-3,2e-3,4e-3,8e-3" "$GPT2_ADAMW"
sweep heads_of_64 "$adamw --params mup --widths 256,512,1024 --head_dim 64 --lrs 2e-3,4e-3,8e-3" "$GPT2_ADAMW"
plot adamw heads_of_64
