#!/usr/bin/env bash
# train_gdn beside its peers on one GPU, in phases that can be called apart: dev/peers/run.sh PHASE [SECONDS]
#   install            wheels of the folders in WHEELS (with blanks between) into SITE; nothing is fetched
#   compile   [240]    what the peers compile, side by side on all cores; may run beside another process that uses the GPU: it
#                      needs up to 60 GiB with all steps (weights and moments, fla's logits), and times nothing but
#                      XLA's own trials of matrix products
#   tune      [150]    fla's autotuners measure their configurations; the GPU must be idle else
#   kernels   [90]     the gated delta rule at the shapes of common.py
#   steps     [120]    training steps
#   gradients [90]     dev/torch/compare.py and accuracy.py
#   report             tables of what there is, also where a phase failed or ran out of time
#   small              a dry run of kernels and report on small shapes, of the peers in PEERS; a CPU will do
# Each phase ends within SECONDS and goes on with the next peer where one fails. Settings: PEERS (ours,fla,jla,flashinfer,flashqla),
# SHAPES and STEPS (with blanks between; default common.py's), PEERS_WORK=/tmp/peers (caches, inputs, logs), OUT or PEERS_OUT (results),
# SITE=$PEERS_WORK/site, PYTHON=python3, GDN_OURS, GDN_FLASHINFER (libraries; README.md says how they are built), MODEL (a checkpoint
# for compare.py), JOBS (cores).
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
HERE=dev/peers
export PEERS_WORK=${PEERS_WORK:-/tmp/peers}
export PEERS_OUT=${PEERS_OUT:-${OUT:-$PEERS_WORK/out}}
SITE=${SITE:-$PEERS_WORK/site} PYTHON=${PYTHON:-python3} PEERS=${PEERS:-ours,fla,jla,flashinfer,flashqla}
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PEERS_WORK/triton} FLA_CACHE_RESULTS=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PEERS_WORK/inductor}
export TILELANG_CACHE_DIR=${TILELANG_CACHE_DIR:-$PEERS_WORK/tilelang}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PEERS_WORK/jax} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$PEERS_WORK/logs" "$PEERS_OUT"
# Results go to one file through all phases: where OUT is emptied between calls, PEERS_WORK keeps them.
KEEP=$PEERS_WORK/results
mkdir -p "$KEEP"
RESULTS=$PEERS_OUT
export PEERS_OUT=$KEEP
shapes=() steps=()
[ -z "${SHAPES:-}" ] || read -r -a shapes <<<"$SHAPES"
[ -z "${STEPS:-}" ] || read -r -a steps <<<"$STEPS"

has() { [[ ",$PEERS," == *",$1,"* ]]; }
constants() { "$PYTHON" -c "import sys; sys.path.insert(0, '$HERE'); import common; print(*common.$1)"; }

say_machine() {
  [ -s "$KEEP/peers.jsonl" ] && grep -q '"machine"' "$KEEP/peers.jsonl" && return
  printf '{"kind": "machine", "device": "%s", "date": "%s", "commit": "%s"}\n' \
    "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)" "$(date -u +%F)" \
    "$(git rev-parse --short HEAD 2>/dev/null || cat COMMIT 2>/dev/null)" >>"$KEEP/peers.jsonl"
}

install() {
  local folder wheel
  mkdir -p "$SITE"
  for folder in ${WHEELS:?WHEELS names the folders with the wheels}; do
    for wheel in "$folder"/*.whl; do  # unpacked, not by pip, whose --target takes away fla-core's `fla` for the other wheel's
      "$PYTHON" -m zipfile -e "$wheel" "$SITE" || exit 1
    done
  done
  (cd "$SITE" && echo ./*.dist-info)
}

compile() {
  local limit=${1:-240} jobs=() job shape spec
  [ ${#shapes[@]} -gt 0 ] || read -r -a shapes <<<"$(constants SHAPES)"
  [ ${#steps[@]} -gt 0 ] || read -r -a steps <<<"$(constants STEPS)"
  run() {  # run NAME COMMAND...
    local name=$1
    shift
    timeout -k 5 "$limit" "$@" >"$PEERS_WORK/logs/compile_$name.log" 2>&1 &
    jobs+=("$!:$name")
  }
  run inputs "$PYTHON" $HERE/inputs.py "${shapes[@]}"
  if has jla; then  # a process each: one compiles on one core
    for shape in "${shapes[@]}"; do run "jla_$shape" "$PYTHON" $HERE/peer_jla.py compile "$shape"; done
    for spec in "${steps[@]}"; do
      [ "${spec%%,*}" -ge 512 ] || continue
      run "jla_$spec" "$PYTHON" $HERE/peer_jla.py compile "step:$spec"
      run "jla_$spec,fp8" "$PYTHON" $HERE/peer_jla.py compile "step:$spec,fp8"
    done
  fi
  if has flashqla && [ -d "$SITE/flash_qla" ]; then
    for shape in "${shapes[@]}"; do
      [[ $shape != *,128,128 ]] || run "flashqla_$shape" "$PYTHON" $HERE/peer_flashqla.py compile "$shape"
    done
  fi
  if has fla; then
    FLA_TILELANG=0 FLA_FLASH_QLA=0 run fla "$PYTHON" $HERE/peer_fla.py compile $((limit - 45)) "${shapes[@]}" "${steps[@]/#/step:}"
  fi
  for job in "${jobs[@]}"; do
    wait "${job%%:*}" || echo "compile ${job#*:}: exit code $?"
    grep -hE 'compiled|inputs of|Error' "$PEERS_WORK/logs/compile_${job#*:}.log" | tail -n 2 | cut -c1-300
  done
}

drive() { timeout -k 5 $(($2 + 20)) "$PYTHON" $HERE/drive.py "$1" --seconds "$2" --peers "$PEERS" "${@:3}"; }

tune() { drive tune "${1:-150}" ${shapes[0]+--shapes "${shapes[@]}"} ${steps[0]+--steps-too "${steps[@]}"}; }
kernels() {
  say_machine
  "$PYTHON" $HERE/inputs.py ${shapes[0]+"${shapes[@]}"} >/dev/null
  drive kernels "${1:-90}" ${shapes[0]+--shapes "${shapes[@]}"}
}
steps() {
  say_machine
  drive steps "${1:-120}" ${steps[0]+--shapes "${steps[@]}"}
}

gradients() {
  local limit=${1:-90} begin=$SECONDS hopper=(--allow-hopper) work
  # Autotuning is cut short there: its choices stay out of the cache that the times are taken with.
  export FLA_CACHE_RESULTS=0 FLA_TILELANG=0 FLA_FLASH_QLA=0
  work=$(mktemp -d)
  if [ -z "${MODEL:-}" ]; then  # a model after a few steps, on the built-in stories
    timeout -k 5 30 ./train_gdn -w 512 -L 4 -T 512 -B 16 -n 20 -s 0 -v 0 -o "$work/model" >"$PEERS_WORK/logs/model.log" 2>&1
    MODEL=$work/model
  fi
  timeout -k 5 $((limit / 2)) "$PYTHON" dev/torch/compare.py "$MODEL" "${hopper[@]}" 2>"$PEERS_WORK/logs/compare.log" |
    tee "$KEEP/compare.txt"
  for heads in "1 2 64 128" "1 2 128 128"; do
    [ $((limit - SECONDS + begin)) -gt 8 ] || { echo "accuracy.py --heads $heads: not run, the time was over"; continue; }
    timeout -k 5 $((limit - SECONDS + begin)) "$PYTHON" dev/torch/accuracy.py "${hopper[@]}" --heads $heads --long 4096 \
      2>"$PEERS_WORK/logs/accuracy.log" | tee "$KEEP/accuracy_${heads// /_}.txt"
  done
  tail -n 3 "$PEERS_WORK/logs/compare.log" "$PEERS_WORK/logs/accuracy.log"
  rm -rf "$work"
}

report() {
  "$PYTHON" $HERE/report.py -o "$KEEP/peers.md"
  [ "$KEEP" = "$RESULTS" ] || cp -f "$KEEP"/* "$RESULTS/"
  tar czf "$RESULTS/peers_logs.tar.gz" -C "$PEERS_WORK" logs
}

small() {
  "$PYTHON" $HERE/inputs.py $(constants SMALL_SHAPES) && drive kernels "${1:-120}" --small --runs 3
  report
}

phase=${1:-}
case $phase in
  install | compile | tune | kernels | steps | gradients | report | small)
    shift
    begin=$SECONDS
    "$phase" "$@"
    code=$?
    echo "== $phase: $((SECONDS - begin)) s"
    exit $code
    ;;
  *)
    sed -n '2,/^set/{/^set/!s/^# \?//p}' "$0" >&2
    exit 1
    ;;
esac
