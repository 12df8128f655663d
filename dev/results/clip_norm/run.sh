#!/usr/bin/env bash
# What the norm that is clipped does to SGD's learning rate at three widths: -clip_norm scaled and plain, all constants 1,
# momentum 0.98, GPT-2's tokens of books. 48 runs; at 17, 31 and 76 s a run (H200, d = 256, 512, 1024) 33 minutes.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
grid="--optimizers sgd --params mup --widths 256,512,1024 --seeds 42,43 --lrs 0.2,0.4,0.8,1.6"
sweep scaled "$grid" "-mom 0.98 -clip_norm scaled"
sweep plain "$grid" "-mom 0.98 -clip_norm plain"
plot scaled plain
