#!/usr/bin/env bash
# What the optimized kernels' arithmetic costs: the reference run on the books shards at d = 256, with the same learning rates
# and seeds, on
#   fast        ./train_gdn
#   readable    ./train_gdn_readable: the kernels of dev/readable
#   halves      ./train_gdn with micro-batches of half the size: the kernels of `fast`, sums in another order
# The difference of halves and fast is what a change of rounding does by itself.
#   dev/readable_runs.sh DATA OUT
# DATA holds books_train_*.bin and books_val_*.bin (or .bin.xz). OUT keeps each run's log and is the state: call again with the
# same OUT to go on where the time ran out. At the end a table of the final validation losses, OUT/losses.md.
# Settings: PER_GPU=3 runs at once on a GPU, CUDA_VISIBLE_DEVICES (default: all GPUs), MINUTES=9.2 of wall time in a call,
# LRS="1e-3 2e-3 4e-3", SEEDS="42 43", VARIANTS="readable fast halves", STEPS=1000, OPTIONS of train_gdn besides. Binaries are
# taken as they are (make train_gdn train_gdn_readable).
set -uo pipefail
[ $# -eq 2 ] || { sed -n '2,/^set/{/^set/!s/^# \?//p}' "$0" >&2; exit 1; }
DATA=$(realpath "$1") && mkdir -p "$2" && OUT=$(realpath "$2") || exit 1
cd "$(dirname "$0")/.." || exit 1
PER_GPU=${PER_GPU:-3} STEPS=${STEPS:-1000} OPTIONS=${OPTIONS:-}
LRS=${LRS:-1e-3 2e-3 4e-3} SEEDS=${SEEDS:-42 43} VARIANTS=${VARIANTS:-readable fast halves}
START=$(date +%s) DEADLINE=$(awk -v minutes="${MINUTES:-9.2}" -v now="$(date +%s)" 'BEGIN { print int(now + 60 * minutes) }')
GPUS=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}
GPUS=${GPUS:-0}

if compgen -G "$DATA/books_train_*.bin.xz" >/dev/null; then
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  python3 - "$DATA" "$unpacked" <<'P' || exit 1
import lzma, pathlib, shutil, sys

for packed in pathlib.Path(sys.argv[1]).glob("books_*.bin.xz"):
    with lzma.open(packed) as source, open(pathlib.Path(sys.argv[2]) / packed.stem, "wb") as to:
        shutil.copyfileobj(source, to)
P
  DATA=$unpacked
fi
for split in train val; do
  compgen -G "$DATA/books_${split}_*.bin" >/dev/null || {
    echo "readable_runs.sh: $DATA/books_${split}_*.bin: no such files" >&2
    exit 1
  }
done

# one_run VARIANT LR SEED, on the GPU of xargs's slot
one_run() {
  local variant=$1 lr=$2 seed=$3 name=$1_lr$2_seed$3 program=./train_gdn micro_batch=64 failed=0 gpus left
  [ -e "$OUT/$name.csv" ] && return
  left=$((DEADLINE - $(date +%s)))
  [ "$left" -gt 0 ] || { echo "$name waits for the next call"; return; }
  [ "$variant" = readable ] && program=./train_gdn_readable
  [ "$variant" = halves ] && micro_batch=32
  IFS=, read -r -a gpus <<<"$GPUS"
  CUDA_VISIBLE_DEVICES=${gpus[$((SLOT % ${#gpus[@]}))]} timeout -s KILL "$left" "$program" -i "$DATA/books_train_*.bin" \
    -j "$DATA/books_val_*.bin" -w 256 -L 8 -heads 6 -T 512 -b "$micro_batch" -B 64 -n "$STEPS" -opt adamw -b1 0.9 -b2 0.95 \
    -wd 0.1 -clip 1 -warmup "$((STEPS / 10))" -lr "$lr" -min_lr "$(awk -v lr="$lr" 'BEGIN { print lr / 20 }')" -param mup \
    -seed "$seed" -v 0 -s 0 -save 0 $OPTIONS -o "$OUT/running_$name" >"$OUT/$name.txt" 2>&1
  case $? in
    0) mv "$OUT/running_$name/log.csv" "$OUT/$name.csv" && echo "$name: $(tail -n 1 "$OUT/$name.csv")" ;;
    137) echo "$name waits for the next call" ;;
    *) failed=1 && echo "$name failed: $(grep -m 1 "^train_gdn: " "$OUT/$name.txt" || tail -n 1 "$OUT/$name.txt")" ;;
  esac
  rm -rf "$OUT/running_$name"
  return $failed
}
export -f one_run
export DATA OUT STEPS OPTIONS GPUS DEADLINE

echo "device: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)   date: $(date -u +%F)   \
commit: $(git rev-parse --short HEAD 2>/dev/null || cat COMMIT 2>/dev/null)" | tee -a "$OUT/about.txt"
gpu_count=$(awk -F, '{ print NF }' <<<"$GPUS")
for variant in $VARIANTS; do
  for lr in $LRS; do
    for seed in $SEEDS; do echo "$variant $lr $seed"; done
  done
done | xargs -P "$((gpu_count * PER_GPU))" -L 1 --process-slot-var=SLOT bash -c 'one_run "$@"' one_run
failed=$?
echo "$(($(date +%s) - START)) s"

python3 - "$OUT" "$LRS" "$SEEDS" <<'P' | tee "$OUT/losses.md"
import csv, pathlib, statistics, sys

out, lrs, seeds = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()


def losses(variant, lr, seed):
    """The training losses by step, and the last validation loss; None where there is no such run."""
    path = out / f"{variant}_lr{lr}_seed{seed}.csv"
    if not path.exists():
        return None
    rows = list(csv.DictReader(path.open()))
    train = {int(r["step"]): float(r["loss"]) for r in rows if r["split"] == "train"}
    return train, [float(r["loss"]) for r in rows if r["split"] == "val"][-1]


def parted(a, b):
    """The first step whose training losses differ by more than 0.01."""
    return next((str(step) for step in sorted(a.keys() & b.keys()) if abs(a[step] - b[step]) > 0.01), "never")


def mean(name, differences):
    if len(differences) < 2:
        return
    error = statistics.stdev(differences) / len(differences) ** 0.5
    print(f"mean of {name}: {statistics.mean(differences):+.4f} +- {error:.4f} (standard error of {len(differences)})")


print("| lr | seed | fast | readable | fast - readable | parted at step | halves | halves - fast | parted at step |")
print("|---|---|---|---|---|---|---|---|---|")
pairs = {"fast - readable": [], "halves - fast": []}
for lr in lrs:
    for seed in seeds:
        fast, readable, halves = (losses(v, lr, seed) for v in ("fast", "readable", "halves"))
        cells = [lr, seed] + [f"{run[1]:.4f}" if run else "" for run in (fast, readable)]
        for name, a, b in (("fast - readable", fast, readable), ("halves - fast", halves, fast)):
            if name == "halves - fast":
                cells.append(f"{halves[1]:.4f}" if halves else "")
            if a and b:
                pairs[name].append((lr, a[1] - b[1]))
            cells += [f"{a[1] - b[1]:+.4f}", parted(a[0], b[0])] if a and b else ["", ""]
        print("| " + " | ".join(cells) + " |")
print()
for name, differences in pairs.items():
    for lr in lrs:
        mean(f"{name} at lr {lr}", [d for at, d in differences if at == lr])
    mean(name, [d for _, d in differences])
P
exit $failed
