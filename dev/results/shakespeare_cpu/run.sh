#!/usr/bin/env bash
# Shakespeare's plays as bytes on a CPU: d = 128, L = 4, 550 steps, 2:34 on two cores. DATA holds tinyshakespeare.txt.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin tinyshakespeare.txt -- "$@"
head -c 1003854 tinyshakespeare.txt >"$OUT/train.txt"
tail -c 111540 tinyshakespeare.txt >"$OUT/val.txt"
"$TRAIN_GDN" -d cpu -i "$OUT/train.txt" -j "$OUT/val.txt" -w 128 -L 4 -n 550 -save 0 "${MORE[@]}" -o "$OUT/run"
mv "$OUT/run/log.csv" "$OUT/log.csv"
