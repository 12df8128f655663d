#!/usr/bin/env bash
# The evidence for learning-rate transfer, on one GPU or several, in pieces of a few minutes:
#   dev/evidence.sh DATA OUT STAGE...
# DATA holds the books shards (books_train_*.bin, books_val_*.bin); for the stages bytes_*, which need minutes where the others
# need an hour, their text too (VOCAB: GPT-2's files, see scripts/detokenize.py):
#   python3 scripts/detokenize.py --vocab VOCAB --separator '\n\n' --tokens 3000000 -o DATA/books_train.txt DATA/books_train_000.bin
#   python3 scripts/detokenize.py --vocab VOCAB --separator '\n\n' --tokens 250000 -o DATA/books_val.txt DATA/books_val_000.bin
# OUT keeps the results and is the state: call again
# with the same OUT, on whatever machine, to go on where the time ran out. Stages:
#   coord      coordinate check, d = 256 to 2048, both ways of growing, AdamW and SGD, sp and mup; then to 4096
#   adamw      {sp, mup} x AdamW, d = 256, 512, 1024, six learning rates, with the logits' factor of dev/tuning.md
#   sgd        {sp, mup0, mup} x SGD with Nesterov momentum, the same widths, with SGD's constants of dev/tuning.md
#   fixed      mup x AdamW with heads of 64, whose number grows
#   seeds      a second seed at the best learning rate of each width and its neighbours (of adamw and sgd)
#   questions  the open questions of mup.h: 1 gains and taps, 3 decay, 4 eps at d = 256 and 1024 around the best learning
#              rate; 2 gates like output weights, there too
#   gradients  of all tensors, of models trained with SGD to the end of the warm-up, d = 256, 512, 1024: slopes of their
#              sizes against the width (open question 2, and what learning rates that grow with the width rest on)
#   tuned      d = 2048 at the best learning rate of d = 256 (mup, AdamW), at half of it, and at twice
#   bytes_sgd  {sp, mup0, mup} x SGD on the text's bytes (L = 4, T = 256, 32 sequences), d = 256, 512, 1024, two seeds, with
#              SGD's constants of dev/tuning.md and momentum 0.9
#   bytes_adamw      {sp, mup} x AdamW, the same
#   bytes_fixed      mup with heads of 64, both optimizers
#   bytes_questions  the open questions 1 to 4 as above, at d = 256 and 1024, two seeds
#   plots      figures and tables of what is there (no GPU)
# Settings: MINUTES=9.2 of wall time in a call, PER_GPU=1 runs at once on a GPU (BYTES_PER_GPU=3), CUDA_VISIBLE_DEVICES
# (default: all GPUs), PYTHON=python3, SEED=43 for the stage seeds, STEPS=1000, WIDTHS="256 512 1024". ./train_gdn is taken
# as it is.
set -uo pipefail
[ $# -ge 3 ] || { sed -n '2,/^set/{/^set/!s/^# \?//p}' "$0" >&2; exit 1; }
DATA=$(realpath "$1") && mkdir -p "$2" && OUT=$(realpath "$2") || exit 1
shift 2
cd "$(dirname "$0")/.." || exit 1
for split in train val; do
  compgen -G "$DATA/books_${split}_*.bin" >/dev/null || {
    echo "evidence.sh: $DATA/books_${split}_*.bin: no such files" >&2
    exit 1
  }
done
PYTHON=${PYTHON:-python3} PER_GPU=${PER_GPU:-1} STEPS=${STEPS:-1000} SEED=${SEED:-43}
read -r -a WIDTHS <<<"${WIDTHS:-256 512 1024}"
BASE=${WIDTHS[0]} WIDE=${WIDTHS[-1]}
END=$(awk -v minutes="${MINUTES:-9.2}" -v now="$EPOCHREALTIME" 'BEGIN { printf "%.3f", now + 60 * minutes }')
if [ -z "${CUDA_VISIBLE_DEVICES:-}" ] && command -v nvidia-smi >/dev/null; then
  CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)
  export CUDA_VISIBLE_DEVICES
fi
SHARDS=(-i "$DATA/books_train_*.bin" -j "$DATA/books_val_*.bin")
ADAMW_LRS=5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2 SGD_LRS=6.4,9.05,12.8,18.1,25.6,36.2
# The base's constants for GPT-2's tokens (dev/tuning.md)
TOKENS_ADAMW="-logit_factor 4"
TOKENS_SGD="-mom 0.95 -clip 0.25 -logit_factor 4 -init_of hidden=4 -warmup $((STEPS / 2)) \
  -lr_of embedding=0.0625,conv=0.25,gain=0.25,output_gain=0.25"
read -r -a MORE <<<"${OPTIONS:-}"  # of train_gdn's options, to try the script out on a small machine
SCHEDULE=(-n "$STEPS" -warmup "$((STEPS / 10))" "${MORE[@]}")
cut_off=0 problems=0

minutes_left() { awk -v end="$END" -v now="$EPOCHREALTIME" 'BEGIN { printf "%.2f", (end - now) / 60 }'; }

# in_time NEED COMMAND...: runs the command, if NEED minutes are left, until the time is over; 1 if they are not.
in_time() {
  local need=$1 left code
  left=$(minutes_left)
  shift
  if awk -v left="$left" -v need="$need" 'BEGIN { exit left >= need }'; then
    cut_off=$((cut_off + 1))
    return 1
  fi
  timeout -k 5 -s TERM "$(awk -v left="$left" 'BEGIN { printf "%.1f", 60 * left + 15 }')" "$@"
  code=$?
  case $code in
    0) ;;
    124 | 130 | 137) cut_off=$((cut_off + 1)) ;;
    *) problems=$((problems + 1)) ;;
  esac
  return 0
}

# sweep NAME NEED "SWEEP'S OPTIONS" "TRAIN_GDN'S OPTIONS": more runs for OUT/NAME.csv
sweep() {
  local name=$1 need=$2
  in_time "$need" "$PYTHON" scripts/sweep.py -o "$OUT/$name.csv" -j "$PER_GPU" --minutes "$(minutes_left)" $3 -- \
    "${SHARDS[@]}" "${SCHEDULE[@]}" $4 > >(tee -a "$OUT/log.txt")
}

# of_best CSV OPTIMIZER PARAM WIDTH: the learning rate of lowest loss and its neighbours on the grid, with commas; without
# such rows the middle of the grid. With a fifth argument "best" only the first.
of_best() {
  "$PYTHON" - "$@" "$ADAMW_LRS" "$SGD_LRS" <<'P'
import csv, os, sys

path, optimizer, param, width, *only, adamw, sgd = sys.argv[1:]
grid = [float(lr) for lr in (adamw if optimizer == "adamw" else sgd).split(",")]
rows = list(csv.DictReader(open(path))) if os.path.exists(path) else []
losses = {
    float(r["lr"]): float(r["val_loss"])
    for r in rows
    if (r["optimizer"], r["param"], r["width"], r["status"], r["seed"]) == (optimizer, param, width, "ok", "42")
}
best = min(losses, key=losses.get) if losses else grid[len(grid) // 2]
i = min(range(len(grid)), key=lambda i: abs(grid[i] - best))
near = [grid[i - 1] if i else best / 2, best, grid[i + 1] if i + 1 < len(grid) else best * 2]
print(f"{best:g}" if only else ",".join(f"{lr:g}" for lr in near))
P
}

tokens() { [ "$1" = adamw ] && echo "$TOKENS_ADAMW" || echo "$TOKENS_SGD"; }

# grid NAME OPTIMIZER LRS "PARAMS...": first what shows transfer, the narrowest and the widest around the middle
grid() {
  local name=$1 optimizer=$2 lrs=$3 params=$4 options=${5:-} constants
  constants=$(tokens "$optimizer")
  local common="--optimizers $optimizer $options" ends="$BASE,$WIDE" all
  all=$(IFS=,; echo "${WIDTHS[*]}")
  local middle
  middle=$(cut -d, -f2-5 <<<"$lrs")
  sweep "$name" 1.5 "$common --params mup --widths $ends --lrs $middle" "$constants"
  [ "$params" = mup ] || sweep "$name" 1.5 "$common --params $params --widths $ends --lrs $middle" "$constants"
  sweep "$name" 1.5 "$common --params $params --widths $ends --lrs $lrs" "$constants"
  sweep "$name" 1 "$common --params $params --widths $all --lrs $lrs" "$constants"
}

adamw() { grid adamw adamw $ADAMW_LRS sp,mup; }
sgd() { grid sgd sgd $SGD_LRS sp,mup0,mup; }
fixed() { grid fixed adamw $ADAMW_LRS mup "--head_dim 64"; }

seeds() {
  local optimizer param width
  for param in mup sp mup0; do
    for optimizer in adamw sgd; do
      [ "$optimizer $param" = "adamw mup0" ] && continue
      for width in "${WIDTHS[@]}"; do
        sweep $optimizer 1 "--optimizers $optimizer --params $param --widths $width --seeds $SEED \
          --lrs $(of_best "$OUT/$optimizer.csv" $optimizer $param "$width")" "$(tokens $optimizer)"
      done
    done
  done
}

questions() {
  local adamw_lrs sgd_lrs width
  adamw_lrs=$(of_best "$OUT/adamw.csv" adamw mup "$WIDE")
  sgd_lrs=$(of_best "$OUT/sgd.csv" sgd mup "$WIDE")
  local mup="--params mup --widths $BASE,$WIDE"
  sweep question1_adamw 1.5 "$mup --optimizers adamw --lrs $adamw_lrs" "$TOKENS_ADAMW -gains hidden"
  sweep question1_sgd 1.5 "$mup --optimizers sgd --lrs $sgd_lrs" "$TOKENS_SGD -gains hidden"
  sweep question2_sgd 1.5 "$mup --optimizers sgd --lrs $sgd_lrs" "$TOKENS_SGD -gates output"
  sweep question2_adamw 1.5 "$mup --optimizers adamw --lrs $adamw_lrs" "$TOKENS_ADAMW -gates output"
  sweep question3 1.5 "$mup --optimizers adamw --lrs $adamw_lrs" "$TOKENS_ADAMW -wd_mode independent"
  sweep question4 1.5 "$mup --optimizers adamw --lrs $adamw_lrs" "$TOKENS_ADAMW -eps 1e-15"
}

# Slopes of the gradients' sizes, on a batch of 8 sequences for each of four seeds, of models trained to the peak of the
# learning rate
gradients() {
  local width lr models
  [ -e "$OUT/gradients_slopes.csv" ] && return
  in_time 5.5 true || return  # the models are not kept
  models=$(mktemp -d)
  lr=$(of_best "$OUT/sgd.csv" sgd mup "$BASE" best)
  for width in "${WIDTHS[@]}"; do
    in_time 1.5 ./train_gdn "${SHARDS[@]:0:2}" -w "$width" -L 8 -heads 6 -T 512 -B 64 -n "$((STEPS / 2 + 1))" -opt sgd \
      $TOKENS_SGD -lr "$lr" -v 0 -s 0 -save 0 "${MORE[@]}" -o "$models/w$width" >"$models/w$width.txt"
  done
  in_time 0.7 "$PYTHON" scripts/coord_check.py -o "$OUT/gradients" --widths "$(IFS=,; echo "${WIDTHS[*]}")" --params mup \
    --growth head_dim --optimizers sgd --seeds 1,2,3,4 --tolerance 9 -- -i "$DATA/books_val_*.bin" -L 8 -T 512 -B 8 \
    -lr 0 -logit_factor 4 "${MORE[@]}" -load "$models/w{width}" >"$OUT/gradients.txt"
  grep -E "grad:" "$OUT/gradients.txt"
  rm -rf "$models"
}

tuned() {
  local lrs
  lrs=$(of_best "$OUT/adamw.csv" adamw mup "$BASE")
  sweep tuned "${TUNED_MINUTES:-5}" "--optimizers adamw --params mup --widths ${TUNED_WIDTH:-2048} -j 1 --lrs $lrs" \
    "$TOKENS_ADAMW"
}

# A run takes 2 to 10 s of an H200, three at once, and a seed changes the loss of a width at all learning rates alike, to
# 0.004 (dev/results/2026-11-28_h200_second).
BYTES_ADAMW="-logit_factor 4" BYTES_SGD="-mom 0.9 -logit_factor 2 -init_of hidden=2,embedding=4 -lr_of embedding=0.25"
bytes_sweep() {
  local SHARDS=(-i "$DATA/books_train.txt" -j "$DATA/books_val.txt") SCHEDULE=("${SCHEDULE[@]}") file
  for file in "$DATA/books_train.txt" "$DATA/books_val.txt"; do
    [ -e "$file" ] || { echo "evidence.sh: $file: no such file (the head of this script says how it is made)" >&2; exit 1; }
  done
  SCHEDULE+=(-L 4 -T 256 -B 32 "${MORE[@]}")
  PER_GPU=${BYTES_PER_GPU:-3} sweep "$1" 0.3 "$2 --seeds 42,43" "$3"
}

all_widths() { (IFS=,; echo "${WIDTHS[*]}"); }

bytes_sgd() {
  bytes_sweep bytes_sgd "--optimizers sgd --params mup --widths $(all_widths) --lrs 0.2,0.4,0.8,1.6,3.2" "$BYTES_SGD"
  bytes_sweep bytes_sgd "--optimizers sgd --widths $(all_widths) --lrs 0.2,0.4,0.8,1.6,3.2" "$BYTES_SGD"
}
bytes_adamw() {
  bytes_sweep bytes_adamw "--optimizers adamw --params mup --widths $(all_widths) --lrs 1e-3,2e-3,4e-3,8e-3,1.6e-2" "$BYTES_ADAMW"
  bytes_sweep bytes_adamw "--optimizers adamw --widths $(all_widths) --lrs 5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2" "$BYTES_ADAMW"
}
bytes_fixed() {
  bytes_sweep bytes_fixed_sgd "--optimizers sgd --params mup --widths $(all_widths) --lrs 0.4,0.8,1.6,3.2 --head_dim 64" "$BYTES_SGD"
  bytes_sweep bytes_fixed_adamw "--optimizers adamw --params mup --widths $(all_widths) --lrs 1e-3,2e-3,4e-3,8e-3 --head_dim 64" \
    "$BYTES_ADAMW"
}
bytes_questions() {
  local mup="--params mup --widths $BASE,$WIDE" sgd="--optimizers sgd --lrs 0.4,0.8,1.6" adamw="--optimizers adamw --lrs 2e-3,4e-3,8e-3"
  bytes_sweep bytes_question1_adamw "$mup $adamw" "$BYTES_ADAMW -gains hidden"
  bytes_sweep bytes_question1_sgd "$mup $sgd" "$BYTES_SGD -gains hidden"
  bytes_sweep bytes_question2_output "$mup $sgd" "$BYTES_SGD -gates output"
  bytes_sweep bytes_question2_aligned "$mup $sgd" "$BYTES_SGD -gates aligned"
  bytes_sweep bytes_question3 "$mup $adamw" "$BYTES_ADAMW -wd_mode independent"
  bytes_sweep bytes_question4 "$mup $adamw" "$BYTES_ADAMW -eps 1e-15"
}

# The last call's seeds are the ones in the tables.
coord() {
  local both="--optimizers adamw,sgd --params sp,mup" seeds
  [ -e "$OUT/coord_runs.tar.gz" ] && tar -xzf "$OUT/coord_runs.tar.gz" -C "$OUT" && rm "$OUT/coord_runs.tar.gz"
  for seeds in 1,2 1,2,3,4 1,2,3,4,5,6,7,8; do
    in_time 1 "$PYTHON" scripts/coord_check.py -o "$OUT/coord" -j "${COORD_PER_GPU:-6}" $both --seeds $seeds \
      ${COORD_WIDTHS:+--widths $COORD_WIDTHS} --table "$OUT/coord.md" -- -i "$DATA/books_train_*.bin" "${MORE[@]}" \
      > >(tee -a "$OUT/log.txt" | grep -v " ok ")
  done
  # heads of 64, and 12 heads: a head's keys are 256 at most
  in_time 2 "$PYTHON" scripts/coord_check.py -o "$OUT/coord4096" -j 2 --params mup --heads 12 --seeds 1,2 \
    --widths "${COORD4096_WIDTHS:-512,1024,2048,4096}" --table "$OUT/coord4096.md" -- -i "$DATA/books_train_*.bin" \
    "${MORE[@]}" > >(tee -a "$OUT/log.txt" | grep -v " ok ")
  mkdir -p "$OUT/coord_runs" "$OUT/coord4096_runs"
  tar -czf "$OUT/coord_runs.tar.gz" -C "$OUT" coord_runs coord4096_runs &&
    rm -r "$OUT/coord_runs" "$OUT/coord4096_runs"
}

plots() {
  local name paired
  for name in adamw sgd fixed question1_adamw question1_sgd question2_sgd question2_adamw question3 question4 \
    bytes_{sgd,adamw,fixed_sgd,fixed_adamw,question1_adamw,question1_sgd,question2_output,question2_aligned,question3,question4}; do
    [ -e "$OUT/$name.csv" ] || continue
    case $name in bytes_*) paired=--paired ;; *) paired= ;; esac  # on bytes a seed moves a width's losses all alike
    "$PYTHON" scripts/plot_transfer.py "$OUT/$name.csv" --base "$BASE" $paired -o "$OUT/$name" --table "$OUT/$name.md" |
      tee -a "$OUT/log.txt" || problems=$((problems + 1))
  done
  [ -e "$OUT/tuned.csv" ] && cut -d, -f3,4,6,9 "$OUT/tuned.csv"
}

for stage in "$@"; do
  case $stage in
    coord | adamw | sgd | fixed | seeds | questions | gradients | tuned | bytes_sgd | bytes_adamw | bytes_fixed | bytes_questions | plots) ;;
    *)
      echo "evidence.sh: stage '$stage': expected coord, adamw, sgd, fixed, seeds, questions, gradients, tuned, bytes_sgd, bytes_adamw, bytes_fixed, \
bytes_questions or plots" >&2
      exit 1
      ;;
  esac
done
echo "== $* at $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || cat COMMIT 2>/dev/null || echo unknown), \
$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | paste -sd';')" | tee -a "$OUT/log.txt"
for stage in "$@"; do
  "$stage"
done
# The runs' logs stay, packed; what they said last is in the CSV.
# (*.part: a run of another sweep that writes to OUT as well)
find "$OUT" -path '*_runs/*' -not -path '*.part/*' -name output.txt -delete
find "$OUT" -path '*_runs/*' -not -path '*.part/*' -name log.csv -exec gzip -nf9 {} +
echo "== $(du -sh "$OUT" | cut -f1) in $OUT; $problems commands ended with an error, $cut_off wait for the next call" |
  tee -a "$OUT/log.txt"
[ $problems -eq 0 ]
