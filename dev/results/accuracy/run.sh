#!/usr/bin/env bash
# Loss and gradients of a trained model, and the gated delta rule alone, against float64; transformers and, where it is
# installed, flash-linear-attention beside them (dev/torch/requirements.txt).
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
"$TRAIN_GDN" -i 'books_train_*.bin' -T 512 -w 512 -n 300 -v 0 -s 0 -save 0 -logit_factor 4 "${MORE[@]}" -o "$OUT/model" | tail -n 1
data=$(pwd)
cd "$ROOT"
"$PYTHON" dev/torch/compare.py "$OUT/model" --data "$data/books_val_*.bin" --round | tee "$OUT/model.txt"
"$PYTHON" dev/torch/accuracy.py -o "$OUT/delta_rule.md"
rm -r "$OUT/model"
