# What the run.sh of dev/results/*/ share; sourced by them. Each is called as
#
#   run.sh TRAIN_GDN DATA OUT [SECONDS=570]
#
# TRAIN_GDN: the program. DATA: folder with books_train_000.bin, books_train_001.bin and books_val_000.bin. OUT: folder for
# data.csv (scripts/sweep.py's columns), runs.tar.gz (each run's log.csv and what it printed) and README.md (the one beside
# run.sh with device, date, commit and seconds filled in). No run is started that would not end within SECONDS; the same
# command goes on from OUT's CSVs, or, where OUT has none, from those beside run.sh.
# Environment: OPTIONS, more of train_gdn's options (to try a script out on a small machine); EXPECT, seconds that a run takes
# by width; COMMIT, where there is no git. Needs bash, python3, tar; no packages of Python.
set -euo pipefail

usage="usage: run.sh TRAIN_GDN DATA OUT [SECONDS=570]"
begin() {
  [ $# -ge 3 ] || { echo "$usage" >&2; exit 1; }
  HERE=$(cd "$(dirname "$0")" && pwd)
  SWEEP=$(cd "$HERE/../../../scripts" && pwd)/sweep.py
  TRAIN_GDN=$(realpath "$1") DATA=$(realpath "$2") LIMIT=${4:-570}
  [ -x "$TRAIN_GDN" ] || { echo "run.sh: $1: no such program" >&2; exit 1; }
  for file in books_train_000.bin books_train_001.bin books_val_000.bin; do
    [ -e "$DATA/$file" ] || { echo "run.sh: $DATA/$file: no such file" >&2; exit 1; }
  done
  case $LIMIT in '' | *[!0-9]*) echo "run.sh: SECONDS '$LIMIT': expected a whole number" >&2; exit 1 ;; esac
  mkdir -p "$3" && OUT=$(realpath "$3")
  COMMIT=${COMMIT:-$(git -C "$HERE" rev-parse --short HEAD 2>/dev/null || echo unknown)}
  for file in "$HERE"/*.csv; do
    [ ! -e "$file" ] || [ -e "$OUT/${file##*/}" ] || cp "$file" "$OUT"
  done
  [ ! -e "$OUT/runs.tar.gz" ] || tar -C "$OUT" -xzf "$OUT/runs.tar.gz"
  EXPECT=${EXPECT:-256=17,512=31,1024=76,2048=222}
  read -r -a MORE <<<"${OPTIONS:-}"
  SECONDS=0 LEFT=0
  cd "$DATA"  # so that the column options holds no path
  trap finish EXIT
}

# sweep "OPTIONS OF SWEEP.PY" "OPTIONS OF TRAIN_GDN" [NAME=data]: more runs for OUT/NAME.csv. Exit code 1, after the line that
# says why, where a run failed.
sweep() {
  local left=$((LIMIT - SECONDS)) said
  # shellcheck disable=SC2086
  said=$(python3 "$SWEEP" --binary "$TRAIN_GDN" -o "$OUT/${3:-data}.csv" --retry --expect "$EXPECT" \
    --minutes "$(python3 -c "print(max($left, 0.01) / 60)")" $1 -- -i 'books_train_*.bin' -j 'books_val_*.bin' -n 1000 -v 0 -s 0 \
    -save 0 $2 "${MORE[@]}" | tee /dev/stderr)
  case $said in *" left (--minutes"*) LEFT=1 ;; esac
}

pack_runs() {
  (cd "$OUT" && shopt -s nullglob && folders=(*_runs) && [ ${#folders[@]} -gt 0 ] &&
    tar -czf runs.tar.gz "${folders[@]}" && rm -r "${folders[@]}") || true
}

finish() {
  local code=$? device=unknown
  pack_runs
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort | uniq -c | sed 's/^ *//' | paste -sd, || true)
  sed "s|^Device: .*|Device: ${device:-CPU}. Date: $(date -u +%F). Commit: $COMMIT. Seconds of the last call: $SECONDS.|" \
    "$HERE/README.md" >"$OUT/README.md"
  [ "$LEFT" = 0 ] || echo "runs are left for which the time did not suffice; the same command goes on"
  echo "$(basename "$HERE"): $SECONDS s"
  exit "$code"
}
