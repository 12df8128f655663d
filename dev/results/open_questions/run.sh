#!/usr/bin/env bash
# The open questions of mup.h on the bytes of books: 1 gains and taps as hidden weights, 2 the gates' initial size and learning
# rate, 3 independent decay, 4 Adam's eps. To be held against the same points of dev/results/transfer_bytes, with which it takes
# about 25 minutes of one H200, three runs at once.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
PER_GPU=${PER_GPU:-3}
begin books_train.txt books_val.txt -- "$@"
on_bytes
sgd="--optimizers sgd --params mup --widths 256,1024 --seeds 42,43 --lrs 0.4,0.8,1.6"
adamw="--optimizers adamw --params mup --widths 256,1024 --seeds 42,43 --lrs 2e-3,4e-3,8e-3"
sweep gains_hidden_adamw "$adamw" "$BYTES_ADAMW -gains hidden"
sweep gains_hidden_sgd "$sgd" "$BYTES_SGD -gains hidden"
sweep gates_output "$sgd" "$BYTES_SGD -gates output"
sweep gates_aligned "$sgd" "$BYTES_SGD -gates aligned"
sweep decay_independent "$adamw" "$BYTES_ADAMW -wd_mode independent"
sweep eps "$adamw" "$BYTES_ADAMW -eps 1e-15"
