#!/usr/bin/env bash
# AdamW on tinyshakespeare's bytes at d = 64 over depths 4, 8 (the base), 16 and 32, on CPU cores: depth's alpha off, 1/2 and 1.
# 120 runs of one core each, PER_GPU of them at once; no GPU is used. Two seeds.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin tinyshakespeare_train.txt tinyshakespeare_val.txt -- "$@"
keep_record
export OMP_NUM_THREADS=1
SHARDS=(-d cpu -i tinyshakespeare_train.txt -j tinyshakespeare_val.txt)
SCHEDULE=(-n 400 -warmup 40 -L0 8 -w0 64 -heads 2 -T 128 -B 8 -vn 256 -v 0 -s 0)
at_once=$PER_GPU PER_GPU=1
# run NAME ALPHA L LR SEED SECONDS: one run, as soon as fewer than at_once are running
run() {
  while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n || true; done
  EXPECT="64=$6"
  sweep "$1~$4~$5" "--optimizers adamw --params mup --widths 64 --lrs $4 --seeds $5" "$GPT2_ADAMW -depth_alpha $2 -L $3" &
}
for seed in 42 43; do
  for depth in 32=340 16=170 8=85 4=42; do
    for lr in 1e-3 2e-3 4e-3 8e-3 1.6e-2 3.2e-2; do
      if [ "${depth%=*}" = 8 ]; then
        run base 1 8 $lr $seed 85
      else
        run "one_${depth%=*}" 1 "${depth%=*}" $lr $seed "${depth#*=}"
        run "off_${depth%=*}" off "${depth%=*}" $lr $seed "${depth#*=}"
        run "half_${depth%=*}" 1/2 "${depth%=*}" $lr $seed "${depth#*=}"
      fi
    done
  done
done
wait
[ -n "${DRY_RUN:-}" ] || "$PYTHON" "$HERE/../depth_transfer/depth_table.py" "$OUT" "$OUT/data.csv" "$OUT/table.md"
