#!/usr/bin/env bash
# The best learning rate over the width on the bytes of books, both optimizers, all parametrizations, both kinds of heads:
# with open_questions about 25 minutes of one H200, three runs at once.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
PER_GPU=${PER_GPU:-3}
begin books_train.txt books_val.txt -- "$@"
on_bytes
grid="--seeds 42,43 --widths 256,512,1024"
sweep sgd "$grid --optimizers sgd --params mup --lrs 0.2,0.4,0.8,1.6,3.2" "$BYTES_SGD"
sweep sgd "$grid --optimizers sgd --params sp,mup0,mup --lrs 0.2,0.4,0.8,1.6,3.2" "$BYTES_SGD"
sweep adamw "$grid --optimizers adamw --params mup --lrs 1e-3,2e-3,4e-3,8e-3,1.6e-2" "$BYTES_ADAMW"
sweep adamw "$grid --optimizers adamw --params sp,mup --lrs 5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2" "$BYTES_ADAMW"
sweep sgd_heads_of_64 "$grid --optimizers sgd --params mup --lrs 0.4,0.8,1.6,3.2 --head_dim 64" "$BYTES_SGD"
sweep adamw_heads_of_64 "$grid --optimizers adamw --params mup --lrs 1e-3,2e-3,4e-3,8e-3 --head_dim 64" "$BYTES_ADAMW"
plot sgd adamw sgd_heads_of_64 adamw_heads_of_64
