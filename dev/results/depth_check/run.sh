#!/usr/bin/env bash
# Makes the tables of this folder: run.sh TRAIN_GDN OUT. About two minutes of two CPU cores. PYTHON=python3
set -uo pipefail
[ $# -eq 2 ] || { echo "usage: $0 TRAIN_GDN OUT" >&2; exit 1; }
ROOT=$(cd "$(dirname "$0")/../../.." && pwd)
TRAIN_GDN=$(realpath "$1")
mkdir -p "$2"
cd "$2" || exit 1
check() {  # check NAME OPTIONS... ; that slopes lie outside is a result, not a failure
  "${PYTHON:-python3}" "$ROOT/scripts/coord_check.py" -o "$1" --table "$1.md" --binary "$TRAIN_GDN" \
    --depths 4,8,16,32 --widths 96 --heads 3 "${@:2}" | grep -v '^[0-9]*/'
  [ -s "$1.md" ]
}
check table --seeds 1,2 --optimizers adamw,sgd -- -d cpu -T 16 &&
  check table_large_embedding --seeds 1,2,3 --optimizers sgd -- -d cpu -T 16 -init_of embedding=50 -logit_factor 0.02 \
    -lr_of embedding=0.001
