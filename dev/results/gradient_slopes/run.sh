#!/usr/bin/env bash
# Slopes of the gradients' sizes against the width, on a batch of 8 sequences for each of four seeds, of models trained with SGD
# to the peak of the learning rate (500 steps at 18.1). 4.5 minutes of an H200 (2026-11-29).
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
widths=${WIDTHS:-256,512,1024}
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
for width in ${widths//,/ }; do
  # shellcheck disable=SC2086
  "$TRAIN_GDN" -i 'books_train_*.bin' -w "$width" -L 8 -heads 6 -T 512 -B 64 -n 501 -opt sgd $GPT2_SGD -lr "${LR:-18.1}" \
    -v 0 -s 0 -save 0 "${MORE[@]}" -o "$models/w$width" >"$OUT/w$width.txt"
done
"$PYTHON" "$ROOT/scripts/coord_check.py" --binary "$TRAIN_GDN" -o "$OUT/gpt2" --widths "$widths" --params mup --growth head_dim \
  --optimizers sgd --seeds 1,2,3,4 --tolerance 9 --table "$OUT/gpt2.md" -- -i 'books_val_*.bin' -L 8 -T 512 -B 8 -lr 0 \
  -logit_factor 4 "${MORE[@]}" -load "$models/w{width}"
