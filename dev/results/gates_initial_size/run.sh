#!/usr/bin/env bash
# The coordinate check with the gates' initial size by fan-in and like output weights, on the CPU, built-in stories.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin -- "$@"
code=0
for gates in independent output; do
  for optimizer in sgd adamw; do
    "$PYTHON" "$ROOT/scripts/coord_check.py" --binary "$TRAIN_GDN" -o "$OUT/${gates}_$optimizer" --params mup --growth head_dim \
      --optimizers $optimizer --widths "${WIDTHS:-256,512,1024,2048}" --seeds "${SEEDS:-1,2,3,4,5,6,7,8}" -- -d cpu -L 2 \
      -gates $gates "${MORE[@]}" || code=1
  done
done
exit $code
