# shellcheck shell=bash
# What the run.sh of the folders beside it share; sourced by them. A run.sh makes its folder's records again:
#
#   dev/results/TOPIC/run.sh TRAIN_GDN DATA OUT [SECONDS=570]
#
# TRAIN_GDN: the program. DATA: the folder of the books shards (books_train_*.bin, books_val_*.bin) and, where a run.sh trains
# on bytes, of books_train.txt and books_val.txt, which scripts/detokenize.py makes of them (VOCAB: GPT-2's files):
#   scripts/detokenize.py --vocab VOCAB --separator '\n\n' --tokens 3000000 -o DATA/books_train.txt DATA/books_train_000.bin
#   scripts/detokenize.py --vocab VOCAB --separator '\n\n' --tokens 250000 -o DATA/books_val.txt DATA/books_val_000.bin
# OUT: the folder for the results, and the state: no sweep starts a run that would not end within SECONDS, and the same command
# goes on from the CSVs in OUT. Exit code 1, after a line that says why, where a file is missing or a run failed.
# Environment: OPTIONS, more of train_gdn's options, the last one of a name counts (to try a script on a small machine);
# WIDTHS, SEEDS; BASE, the plots' base width [256]; PER_GPU, runs at once on a GPU; EXPECT, the seconds that a run takes by
# width, until one of it has ended; COMMIT, where there is no git; DRY_RUN=1, list the runs and train nothing;
# CUDA_VISIBLE_DEVICES; PYTHON.
set -euo pipefail

# begin FILES... -- ARGUMENTS...: what DATA must hold, then run.sh's own arguments. Changes to DATA, so that no path gets into
# a CSV's column options.
begin() {
  local needed=() file
  while [ "$1" != -- ]; do needed+=("$1") && shift; done
  shift
  if [ $# -lt 3 ]; then
    echo "usage: $0 TRAIN_GDN DATA OUT [SECONDS=570]" >&2
    exit 1
  fi
  HERE=$(cd "$(dirname "$0")" && pwd)
  ROOT=$(cd "$HERE/../../.." && pwd)
  TRAIN_GDN=$(realpath "$1") LIMIT=${4:-570} PYTHON=${PYTHON:-python3} PER_GPU=${PER_GPU:-1}
  [ -x "$TRAIN_GDN" ] || { echo "run.sh: $1: no such program" >&2; exit 1; }
  case $LIMIT in '' | *[!0-9]*) echo "run.sh: SECONDS '$LIMIT': expected a whole number" >&2; exit 1 ;; esac
  for file in "${needed[@]}"; do
    compgen -G "$2/$file" >/dev/null || { echo "run.sh: $2/$file: no such file" >&2; exit 1; }
  done
  mkdir -p "$3"
  OUT=$(realpath "$3")
  cd "$2"
  read -r -a MORE <<<"${OPTIONS:-}"
  SHARDS=(-i 'books_train_*.bin' -j 'books_val_*.bin') SCHEDULE=(-n 1000 -warmup 100)
  EXPECT=${EXPECT-256=17,512=31,1024=76,2048=222}  # GPT-2's tokens on an H200
  SECONDS=0
  about
}

# keep_record: OUT becomes what this folder is to hold. Goes on from the CSVs beside run.sh where OUT has none; at the end
# runs.tar.gz has each run's log.csv and what it printed, and README.md is the one beside run.sh with `about` as its line
# "Device: ...".
keep_record() {
  local file
  for file in "$HERE"/*.csv; do
    [ ! -e "$file" ] || [ -e "$OUT/${file##*/}" ] || cp "$file" "$OUT"
  done
  [ -z "${DRY_RUN:-}" ] || return 0
  [ ! -e "$OUT/runs.tar.gz" ] || tar -C "$OUT" -xzf "$OUT/runs.tar.gz"
  trap finish_record EXIT
}

finish_record() {
  local code=$? folders
  (cd "$OUT" && shopt -s nullglob && folders=(*_runs) && [ ${#folders[@]} -gt 0 ] &&
    tar -czf runs.tar.gz "${folders[@]}" && rm -r "${folders[@]}") || true
  sed "s|^Device: .*|$(tail -n 1 "$OUT/about.txt") Seconds of the last call: $SECONDS.|" "$HERE/README.md" >"$OUT/README.md"
  rm "$OUT/about.txt"
  echo "$(basename "$HERE"): $SECONDS s"
  exit "$code"
}

# What a README's head says: device, date, commit, command.
about() {
  local device commit
  device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | paste -sd';' || true)
  commit=${COMMIT:-$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)}
  echo "Device: ${device:-$(nproc) CPU cores}. Date: $(date -u +%F). Commit: $commit. Command: \`dev/results/$(basename "$HERE")/run.sh\`." |
    tee -a "$OUT/about.txt"
}

# sweep NAME "SWEEP'S OPTIONS" "TRAIN_GDN'S OPTIONS": more runs for OUT/NAME.csv (scripts/sweep.py)
sweep() {
  local left=$((LIMIT - SECONDS)) given=()
  [ "$left" -gt 0 ] || { echo "$1: waits for the next call"; return 0; }
  [ -z "${WIDTHS:-}" ] || given+=(--widths "$WIDTHS")
  [ -z "${SEEDS:-}" ] || given+=(--seeds "$SEEDS")
  [ -z "${DRY_RUN:-}" ] || given+=(--dry-run)
  # shellcheck disable=SC2086
  "$PYTHON" "$ROOT/scripts/sweep.py" --binary "$TRAIN_GDN" -o "$OUT/$1.csv" -j "$PER_GPU" --retry --expect "$EXPECT" \
    --minutes "$(awk -v s="$left" 'BEGIN { print s / 60 }')" $2 "${given[@]}" -- "${SHARDS[@]}" "${SCHEDULE[@]}" $3 "${MORE[@]}"
}

# on_bytes: the sweeps after it train on the books' bytes
on_bytes() {
  SHARDS=(-i books_train.txt -j books_val.txt) SCHEDULE=(-n 1000 -warmup 100 -L 4 -T 256 -B 32) EXPECT=
}

# plot NAME...: table and figure of OUT/NAME.csv
plot() {
  local name
  [ -z "${DRY_RUN:-}" ] || return 0
  for name in "$@"; do
    [ ! -e "$OUT/$name.csv" ] ||
      "$PYTHON" "$ROOT/scripts/plot_transfer.py" "$OUT/$name.csv" -o "$OUT/$name" --base "${BASE:-256}" --ymax 0.4 \
        --table "$OUT/$name.md"
  done
}

# The constants of the base (dev/tuning.md), with GPT-2's tokens and with bytes
# shellcheck disable=SC2034
GPT2_ADAMW="-logit_factor 4"
# shellcheck disable=SC2034
GPT2_SGD="-warmup 500 -mom 0.95 -clip 0.25 -logit_factor 4 -init_of hidden=4 \
  -lr_of embedding=0.0625,conv=0.25,gain=0.25,output_gain=0.25"
# shellcheck disable=SC2034
BYTES_ADAMW="-logit_factor 4"
# shellcheck disable=SC2034
BYTES_SGD="-mom 0.9 -logit_factor 2 -init_of hidden=2,embedding=4 -lr_of embedding=0.25"
