#!/usr/bin/env bash
# Several ranks on GPUs: bits, NCCL in the graph, and the time of a step with and without.
#
#   dev/gpu_ranks.sh OUT [BASELINE]
#
# OUT gets summary.txt, the logs and overlap_RANKS_MICRO-BATCHES.csv (dev/bench_overlap); BASELINE is a checkout of an
# older commit with train_gdn and dev/bench_step built there, whose step is timed by turns with this one's. Needs a GPU,
# mpirun, and for NCCL its library; with two or more GPUs one rank each is tried, too. Expected: every line "same bits:
# yes", every "ratio" at most 1.01 (with two micro-batches a step and -sum tree 1.02: one more gradient buffer is zeroed
# and added), "tests: ... 0 failed".
set -uo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?OUT} baseline=${2:-}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun="mpirun --oversubscribe --bind-to none"
gpus=$(nvidia-smi --list-gpus | wc -l)
say() { echo "$*" | tee -a "$out/summary.txt"; }

# run NAME COMMAND...: a training into OUT/NAME; its words to OUT/NAME.txt
run() {
  local name=$1
  shift
  rm -rf "${out:?}/$name"
  "$@" -o "$out/$name" >"$out/$name.txt" 2>&1 || say "FAILED: $name: $(grep -h '^train_gdn: ' "$out/$name.txt" | head -n 1)"
}
# hash NAME: of the last checkpoint's weights and moments, and of losses and norms
hash() {
  cat "$(ls -d "$out/$1"/step_* | tail -n 1)"/{model,training_state}.safetensors \
    <(grep -v '^#' "$out/$1/log.csv" | cut -d, -f1-5) | sha256sum | cut -c1-16
}
# ms NAME: the median step, after the first ten, and the milliseconds of it that were waited
ms() {
  grep ',train,' "$out/$1/log.csv" | tail -n +11 | cut -d, -f6 | sort -g | awk '{x[NR] = $1} END {print x[int((NR + 1) / 2)]}'
}
waited() {
  grep ',train,' "$out/$1/log.csv" | tail -n +11 | cut -d, -f11 | sort -g | awk '{x[NR] = $1} END {print x[int((NR + 1) / 2)]}'
}
same() { [ "$(hash "$1")" = "$(hash "$2")" ] && echo yes || echo NO; }
ratio() { awk -v a="$1" -v b="$2" 'BEGIN {printf "%.4f", a / b}'; }

: >"$out/summary.txt"
say "commit $(git describe --always --dirty), $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1), $gpus GPU(s)"
make gpu-check | tee -a "$out/summary.txt"

say "== tests"
./test_gdn --test-case='cuda*,CUDA*,ranks*,training step*,overlap*' >"$out/tests.txt" 2>&1
say "tests: $(tail -n 1 "$out/tests.txt")"

say "== bits: d = 512, 8 micro-batches a step, 12 steps"
small="-w 512 -L 4 -T 256 -B 16 -b 2 -n 12 -v 6 -vn 20 -s 0 -save 0"
for opt in "adamw" "sgd -lr 0.3"; do
  run one ./train_gdn $small -opt $opt
  run nccl1 ./train_gdn $small -opt $opt -comm nccl
  say "-opt $opt: NCCL with one rank, same bits: $(same one nccl1)"
  for n in 2 4; do
    run host$n $mpirun -n $n ./train_gdn $small -opt $opt -comm host
    say "-opt $opt: $n ranks through the host, same bits: $(same one host$n)"
    if [ "$gpus" -ge $n ]; then
      run nccl$n $mpirun -n $n ./train_gdn $small -opt $opt -comm nccl
      say "-opt $opt: $n ranks by NCCL, same bits: $(same one nccl$n)"
    fi
  done
done

say "== a step's time, ms: one rank, without and with NCCL's calls in its graph"
for w in 256 1024; do
  wide="-w $w -L 8 -T 1024 -B 32 -b 32 -n 60 -v 0 -s 0 -save 0 -vn 32"
  run plain$w ./train_gdn $wide
  run nccl1_$w ./train_gdn $wide -comm nccl
  say "d = $w: one rank $(ms plain$w), NCCL with one rank $(ms nccl1_$w), ratio $(ratio "$(ms nccl1_$w)" "$(ms plain$w)"), waited $(waited nccl1_$w), same bits: $(same plain$w nccl1_$w)"
  run tree$w ./train_gdn $wide -B 64
  run running$w ./train_gdn $wide -B 64 -sum running
  say "d = $w, two micro-batches: -sum tree $(ms tree$w), running $(ms running$w), ratio $(ratio "$(ms tree$w)" "$(ms running$w)")"
  if [ -n "$baseline" ]; then
    run base$w "$baseline/train_gdn" $wide
    run plain${w}_again ./train_gdn $wide
    run base${w}_again "$baseline/train_gdn" $wide
    say "d = $w: baseline $(ms base$w), $(ms base${w}_again); this $(ms plain$w), $(ms plain${w}_again); ratio $(ratio "$(ms plain${w}_again)" "$(ms base${w}_again)"); same bits: $(same plain$w base$w)"
  fi
  for n in 2 4 8; do
    [ "$gpus" -ge $n ] || continue
    run weak${n}_$w $mpirun -n $n ./train_gdn $wide -B $((32 * n)) -comm nccl
    say "d = $w, B = 32 a GPU, $n GPUs: $(ms weak${n}_$w), waited $(waited weak${n}_$w), weak scaling $(ratio "$(ms plain$w)" "$(ms weak${n}_$w)")"
  done
  run shared2_$w $mpirun -n 2 ./train_gdn $wide -B 64 -n 20 -comm host
  say "d = $w, 2 ranks on one GPU through the host (they take turns): $(ms shared2_$w), waited $(waited shared2_$w)"
done

say "== what the layers hide of the exchanges (dev/bench_overlap; no GPU sends anything with one rank)"
make dev/bench_overlap >"$out/make_overlap.txt" 2>&1 || say "FAILED: make dev/bench_overlap"
for n in 1 2 4 8; do
  [ "$gpus" -ge $n ] || continue
  for micro in 1 2; do
    $mpirun -n $n dev/bench_overlap -d 1024 -micro $micro -csv "$out/overlap_${n}_$micro.csv" 2>&1 | tee -a "$out/summary.txt"
  done
done

if [ -n "$baseline" ]; then
  say "== dev/bench_step: baseline, this, baseline, this"
  for turn in 1 2; do
    "$baseline/dev/bench_step" -d 256,512,1024 -csv "$out/step_baseline_$turn.csv" >>"$out/bench.txt" 2>&1
    dev/bench_step -d 256,512,1024 -csv "$out/step_this_$turn.csv" >>"$out/bench.txt" 2>&1
  done
  for turn in 1 2; do
    paste -d, "$out/step_baseline_$turn.csv" "$out/step_this_$turn.csv" |
      awk -F, 'NR > 1 {printf "d = %s: baseline %s ms, this %s, ratio %.4f\n", $2, $9, $23, $23 / $9}' | tee -a "$out/summary.txt"
  done
fi
rm -rf "$out"/*/step_*
