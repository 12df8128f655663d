#!/usr/bin/env bash
# The reference run on the books shards at d = 256 and 512, several seeds: the validation loss and how far seeds are apart. 20 s
# and 37 s a run on an H200.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
for seed in $(tr , ' ' <<<"${SEEDS:-42,1,2,3,4}"); do
  for width in $(tr , ' ' <<<"${WIDTHS:-256,512}"); do
    [ ! -e "$OUT/d${width}_seed$seed.csv" ] || continue
    "$TRAIN_GDN" "${SHARDS[@]}" -w "$width" -L 8 -heads 6 -T 512 -b 64 -B 64 -n 1000 -opt adamw -b1 0.9 -b2 0.95 -wd 0.1 \
      -clip 1 -warmup 100 -lr 4e-3 -min_lr 2e-4 -param mup -v 250 -s 0 -save 0 -seed "$seed" "${MORE[@]}" -o "$OUT/running" |
      grep validation | tail -n 1
    mv "$OUT/running/log.csv" "$OUT/d${width}_seed$seed.csv"
    rm -r "$OUT/running"
  done
done
