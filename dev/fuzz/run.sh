#!/usr/bin/env bash
# dev/fuzz/run.sh SECONDS [TARGET ...]: builds the fuzz targets (clang, libFuzzer, AddressSanitizer, UBSan) and runs each
# of them for an equal share of the time, from the inputs in corpus/. Ends with exit code 1 at the first fault, whose
# input it leaves here as fault_*. On Debian: apt-get install clang libclang-rt-14-dev
#
# RUNS=N in the environment: N inputs a target in place of a time. KEEP=FOLDER: the programs and the grown corpora stay
# there, and are used again.
set -euo pipefail
seconds=${1:?dev/fuzz/run.sh SECONDS [TARGET ...]}
shift
work=${KEEP:-$(mktemp -d)}
mkdir -p "$work"
work=$(realpath "$work")
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
cd "$(dirname "$0")"
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then for source in *.cpp; do targets+=("${source%.cpp}"); done; fi
command -v clang++ >/dev/null || { echo "dev/fuzz/run.sh: needs clang++: apt-get install clang libclang-rt-14-dev" >&2; exit 1; }
each=$((seconds / ${#targets[@]}))
for target in "${targets[@]}"; do
  if [ ! -x "$work/$target" ] || [ -n "$(find "$target.cpp" fuzz.h ../../*.h ../../gdn/*.h -newer "$work/$target")" ]; then
    clang++ -std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -fsanitize=fuzzer,address,undefined \
      -fno-sanitize-recover=undefined "$target.cpp" ../../gdn/communicator.cpp -o "$work/$target"
  fi
  mkdir -p "$work/corpus_$target"
  # -max_len: a small model's checkpoint; -malloc_limit_mb: what a small file may make the program ask for
  "$work/$target" -max_len=$([ "$target" = checkpoint ] && echo 20000 || echo 4096) -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=400 \
    -print_final_stats=1 -verbosity=0 -artifact_prefix="$PWD/fault_${target}_" \
    $([ -n "${RUNS:-}" ] && echo "-runs=$RUNS" || echo "-max_total_time=$((each > 0 ? each : 1))") \
    "$work/corpus_$target" "$PWD/corpus/$target" >"$work/$target.log" 2>&1 || { tail -n 40 "$work/$target.log"; echo "dev/fuzz/run.sh: $target failed" >&2; exit 1; }
  echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log") inputs"
done
