#!/usr/bin/env bash
# Everything that needs a GPU, in parts: dev/gpu_check.sh PART...
#   tests      ./test_gdn (FILTER: only the cases that match)
#   sanitize   compute-sanitizer memcheck and racecheck over the CUDA tests
#   bench      dev/bench_layers and dev/bench_delta_rule: the kernels
#   speed      dev/bench_step: tokens/s and memory of the training step (SIZES: widths with commas; OPTIONS: -phases ...)
#   books      the reference run on the books shards at d = 256 and 512 (BOOKS names their folder, .bin or .bin.xz)
# Binaries are taken as they are (make builds them). Logs go to $OUT (default: a new folder under dev/results).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-dev/results/$(date +%Y%m%d_%H%M%S)}
mkdir -p "$OUT"
failures=0

part() {  # part NAME COMMAND...: runs, keeps the log, says how it ended
  local name=$1 start=$SECONDS
  shift
  "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  [ $code -eq 0 ] || failures=$((failures + 1))
  echo "== $name: exit $code, $((SECONDS - start)) s: $*"
}

device() { nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1; }

tests() {
  part tests timeout "${TESTS_LIMIT:-400}" ./test_gdn ${FILTER:+--test-case="$FILTER"}
  grep -E "ERROR|FATAL|CHECK|REQUIRE|error|values:|TEST CASE|:=" "$OUT/tests.log" | head -n "${LINES_SHOWN:-120}"
  tail -n 1 "$OUT/tests.log"
}

sanitize() {
  part sanitize make -o test_gdn sanitize
  grep -E "ERROR SUMMARY|RACECHECK SUMMARY|passed" "$OUT/sanitize.log"
}

bench() {
  part bench_layers ./dev/bench_layers -d 1024
  part bench_delta_rule ./dev/bench_delta_rule
  cat "$OUT/bench_layers.log" "$OUT/bench_delta_rule.log"
}

# The unpacked books shards' folder.
books_folder() {
  local data=${BOOKS:?BOOKS names the folder with the books shards (.bin or .bin.xz)} unpacked=/tmp/train_gdn_books
  mkdir -p "$unpacked"
  for packed in "$data"/*.bin.xz; do
    [ -e "$packed" ] && [ ! -e "$unpacked/$(basename "$packed" .xz)" ] && python3 -c "import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], 'wb'))" "$packed" "$unpacked/$(basename "$packed" .xz)"
  done
  compgen -G "$unpacked/*.bin" >/dev/null || ln -s "$(realpath "$data")"/*.bin "$unpacked/"
  echo "$unpacked"
}

speed() {
  part speed ./dev/bench_step ${SIZES:+-d "$SIZES"} ${OPTIONS:-} -csv "$OUT/speed.csv"
  cat "$OUT/speed.log"
}

books() {
  local data work
  data=$(books_folder)
  work=$(mktemp -d)
  for width in ${WIDTHS:-256 512}; do
    part "books_d$width" ./train_gdn -i "$data/books_train_*.bin" -j "$data/books_val_*.bin" -w "$width" -L 8 -heads 6 \
      -T 512 -b 64 -B 64 -n 1000 -opt adamw -b1 0.9 -b2 0.95 -wd 0.1 -clip 1 -warmup 100 -lr 4e-3 -min_lr 2e-4 \
      -param mup -v 250 -s 0 -save 0 -o "$work/d$width"
    cp "$work/d$width/log.csv" "$OUT/books_d$width.csv"
    grep -E "validation|train_gdn:" "$OUT/books_d$width.log"
  done
}

echo "device: $(device)   date: $(date -u +%F)   commit: $(git rev-parse --short HEAD 2>/dev/null || cat COMMIT 2>/dev/null)" | tee "$OUT/about.txt"
for p in "${@:-tests}"; do "$p"; done
echo "$failures parts failed"
[ "$failures" -eq 0 ]
