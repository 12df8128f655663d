#!/usr/bin/env bash
# The coordinate check to d = 2048 (fixed heads, sp and mup, AdamW and SGD, two seeds), then to 4096 for 12 heads and for heads
# of 64. Ends with exit code 1 where a slope of mup's is outside its range, as some are (README.md).
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' -- "$@"
check() {
  local name=$1
  shift
  "$PYTHON" "$ROOT/scripts/coord_check.py" --binary "$TRAIN_GDN" -o "$OUT/$name" --optimizers adamw,sgd --params sp,mup \
    --seeds "${SEEDS:-1,2}" --table "$OUT/$name.md" "$@" -- -i 'books_train_*.bin' "${MORE[@]}"
}
code=0
check to_2048 --growth head_dim --widths "${WIDTHS:-256,512,1024,2048}" -j "$PER_GPU" || code=1
check to_4096 --heads 12 --widths "${WIDTHS_4096:-512,1024,2048,4096}" || code=1
exit $code
