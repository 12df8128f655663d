#!/usr/bin/env bash
# train_gdn beside its peers on one GPU, in phases that can run in calls of a few minutes each:
#
#   dev/peers/run.sh PHASE [SECONDS]        each phase has a limit of its own if none is given
#
#   compile    CPU: inputs, Triton's and JAX's kernels on all cores. Little GPU memory; may run beside a training
#   tune       fla's autotuners measure their configurations, with the GPU to themselves
#   kernels    the gated delta rule at the shapes of common.py, every peer held to float64 first, then timed in turns
#   steps      one training step of the same sizes, in turns
#   gradients  dev/torch/accuracy.py and compare.py: errors of outputs and gradients beside float64
#   flashqla   compiles FlashQLA's kernels and times it beside ours (its wheels are large: by itself)
#   report     PEERS_OUT/report.md from what there is
#
# Before: make GPU_ARCH=90a dev/bench_step dev/delta_rule_file train_gdn, the two libraries of ours_c.cu and flashinfer_c.cu
# (their heads say how), and the peers' wheels (dev/peers/README.md) on PYTHONPATH. Environment: PEERS_WORK=/tmp/peers (inputs,
# caches, logs), PEERS_OUT=$PEERS_WORK/out (results), GDN_OURS, GDN_FLASHINFER (the libraries), COMMIT, SMALL=1 (a dry run).
# No phase fails because a peer does: what could not be measured is a line of the report.
set -uo pipefail
phase=${1:-}
cd "$(dirname "$0")" || exit 1
export PEERS_WORK=${PEERS_WORK:-/tmp/peers}
export PEERS_OUT=${PEERS_OUT:-$PEERS_WORK/out}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PEERS_WORK/triton} JAX_COMPILATION_CACHE_DIR=$PEERS_WORK/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export XLA_PYTHON_CLIENT_PREALLOCATE=false FLA_CACHE_RESULTS=1 FLA_TILELANG=${FLA_TILELANG:-0} FLA_FLASH_QLA=0
export GDN_OURS=${GDN_OURS:-./libgdn_ours.so} GDN_FLASHINFER=${GDN_FLASHINFER:-./libgdn_fi_sm90.so}
PYTHON=${PYTHON:-python3}
mkdir -p "$PEERS_WORK/logs" "$PEERS_OUT"
small=()
[ -z "${SMALL:-}" ] || small=(--small)
read -r -a shapes <<<"$($PYTHON -c "import common; print(*(common.SMALL_SHAPES if '${SMALL:-}' else common.SHAPES))")"
read -r -a steps <<<"$($PYTHON -c "import common; print(*(common.SMALL_STEPS if '${SMALL:-}' else common.STEPS))")"

machine() {
  local device
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
  $PYTHON - "${device:-CPU}" "$(date -u +%F)" "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}" <<'PY'
import sys
import common
common.Record().add("machine", device=sys.argv[1], date=sys.argv[2], commit=sys.argv[3])
PY
}

compile() {
  local seconds=${1:-230} what
  $PYTHON inputs.py "${shapes[@]}" || return 1
  timeout "$seconds" "$PYTHON" peer_fla.py compile "$((seconds - 45))" "${shapes[@]}" "${steps[@]/#/step:}" \
    >"$PEERS_WORK/logs/fla_compile.log" 2>&1 &
  for what in "${shapes[@]}" "${steps[@]/#/step:}"; do
    case $what in
      step:256,*) continue ;; # no kernel for heads of 32
      step:1024,* | step:2048,*)
        timeout "$seconds" "$PYTHON" peer_jla.py compile "$what,fp8" >"$PEERS_WORK/logs/jla_compile_${what//[:,]/_}_fp8.log" 2>&1 & ;;
    esac
    timeout "$seconds" "$PYTHON" peer_jla.py compile "$what" >"$PEERS_WORK/logs/jla_compile_${what//[:,]/_}.log" 2>&1 &
  done
  wait
  tail -qn 1 "$PEERS_WORK"/logs/*_compile*.log
}

gradients() {
  local seconds=${1:-120} root=../.. at=$PEERS_WORK/compared
  cd "$root" || return 1
  timeout "$seconds" "$PYTHON" dev/torch/accuracy.py --allow-hopper >"$PEERS_OUT/accuracy.txt" 2>"$PEERS_WORK/logs/accuracy.log" ||
    tail -n 3 "$PEERS_WORK/logs/accuracy.log"
  rm -rf "$at"
  ./train_gdn -w 256 -L 4 -T 512 -B 8 -n 20 -v 0 -s 0 -save 0 -o "$at" >"$PEERS_WORK/logs/compare.log" 2>&1 &&
    timeout "$seconds" "$PYTHON" dev/torch/compare.py "$at" --allow-hopper >"$PEERS_OUT/compare.txt" 2>>"$PEERS_WORK/logs/compare.log" ||
    tail -n 3 "$PEERS_WORK/logs/compare.log"
  timeout "$seconds" "$PYTHON" dev/torch/compare.py "$at" --round --allow-hopper >"$PEERS_OUT/compare_rounded.txt" 2>>"$PEERS_WORK/logs/compare.log" ||
    tail -n 3 "$PEERS_WORK/logs/compare.log"
  tail -n 30 "$PEERS_OUT/accuracy.txt"
}

case $phase in
  compile) compile "${2:-230}" ;;
  tune) $PYTHON drive.py tune --seconds "${2:-100}" "${small[@]}" ;;
  kernels)
    machine
    $PYTHON drive.py kernels --seconds "${2:-120}" --peers ours,fla,jla,flashinfer "${small[@]}" ;;
  steps) $PYTHON drive.py steps --seconds "${2:-120}" "${small[@]}" ;;
  gradients) gradients "${2:-120}" ;;
  flashqla)
    only=()
    for shape in "${shapes[@]}"; do [[ $shape == *,128,128 ]] && only+=("$shape"); done
    timeout "$((${2:-150} / 2))" "$PYTHON" peer_flashqla.py compile "${only[@]}" 2>"$PEERS_WORK/logs/flashqla_compile.log" ||
      tail -n 3 "$PEERS_WORK/logs/flashqla_compile.log"
    machine
    $PYTHON drive.py kernels --seconds "$((${2:-150} / 2))" --peers ours,flashqla,flashinfer --shapes "${only[@]}" ;;
  report) $PYTHON report.py -o "$PEERS_OUT/report.md" ;;
  *)
    sed -n '2,/^set/{/^set/!s/^# \?//p}' "$0" >&2
    exit 1 ;;
esac
