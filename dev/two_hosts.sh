#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces joined by a veth pair, each with a name of its own, one rank in each,
# over TCP. As root, with iproute2 and Open MPI:
#
#   dev/two_hosts.sh [MBIT [WIDTH]]
#
# trains on the CPU with one process and with the two hosts and compares the bits; then cuts the link in the middle of a
# run, which has to end within 30 s with one line. MBIT limits the link (tc); WIDTH is the model's [64]. The last line is: N passed, N failed.
set -euo pipefail
train_gdn=$(cd "$(dirname "$0")/.." && pwd)/train_gdn
rate=${1:-} width=${2:-64}
work=$(mktemp -d)
a=gdn-a$$ b=gdn-b$$ # namespaces, and names of the hosts
passed=0 failed=0
finish() {
  for ns in $a $b; do
    ip netns pids $ns 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
    ip netns del $ns 2>/dev/null || true
  done
  rm -rf "$work"
}
trap finish EXIT
check() { # check WHAT COMMAND...
  local what=$1
  shift
  if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)) what="FAILED: $what"; fi
  echo "$what"
}

ip netns add $a
ip netns add $b
ip link add va$$ netns $a type veth peer name vb$$ netns $b
ip -n $a addr add 10.77.0.1/24 dev va$$
ip -n $b addr add 10.77.0.2/24 dev vb$$
for ns in $a $b; do
  ip -n $ns link set lo up
  # mpirun waits for the daemon on the other host until TCP gives up, by default after 15 minutes
  ip netns exec $ns sysctl -q -w net.ipv4.tcp_retries2=3
done
ip -n $a link set va$$ up
ip -n $b link set vb$$ up
if [ -n "$rate" ]; then
  ip netns exec $a tc qdisc add dev va$$ root tbf rate "${rate}mbit" burst 256kb latency 50ms
  ip netns exec $b tc qdisc add dev vb$$ root tbf rate "${rate}mbit" burst 256kb latency 50ms
fi

# what mpirun calls in the place of ssh: AGENT HOST COMMAND
cat >"$work/agent" <<END
#!/bin/sh
shift
exec ip netns exec $b unshare --uts sh -c "hostname $b; \$*"
END
chmod +x "$work/agent"
two_hosts() { # mpirun of two ranks, one a host
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 ip netns exec $a unshare --uts sh -c \
    "hostname $a; exec mpirun --host 10.77.0.1:1,10.77.0.2:1 --mca plm_rsh_agent $work/agent --mca btl tcp,self \
    --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 --mca oob_tcp_keepalive_time 12 \
    --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 3 --wdir $work $train_gdn $*"
}
result() { # of a run: a hash of what must not depend on the number of ranks
  cat "$work/$1"/step_*/model.safetensors "$work/$1"/step_*/training_state.safetensors \
    <(grep -v '^#' "$work/$1/log.csv" | cut -d, -f1-5) | sha256sum
}
model="-d cpu -w $width -heads 3 -L 2 -T 64 -B 8 -b 1 -s 0"

(cd "$work" && OMP_NUM_THREADS=1 "$train_gdn" $model -n 10 -v 5 -save 0 -o one >/dev/null)
two_hosts $model -n 10 -v 5 -save 0 -o two >"$work/out"
check "two ranks on two hosts: $(grep -o '2 ranks, [0-9]* on this host' "$work/out")" \
  grep -q '2 ranks, 1 on this host' "$work/out"
check "the bits of one rank" [ "$(result one)" = "$(result two)" ]
sent=$(ip netns exec $a cat /sys/class/net/va$$/statistics/tx_bytes)
check "bytes that the first host sent: $sent" [ "$sent" -gt 1000000 ]
column() { # the median of a column of the log
  grep ',train,' "$work/two/log.csv" | cut -d, -f"$1" | sort -g | awk '{x[NR] = $1} END {print x[int((NR + 1) / 2)]}'
}
echo "d $width, ${rate:-no limit in} Mbit/s: a step $(column 6) ms, of which waited $(column 11) ms; $(grep ' parameters: ' "$work/out")"

two_hosts $model -n 100000 -v 0 -save 5 -o cut -timeout 10 >"$work/steps" 2>"$work/err" &
for ((i = 0; i < 600; i++)); do
  ! grep -q '^step 12/' "$work/steps" || break
  sleep 0.1
done
ip -n $b link set vb$$ down
begin=$(date +%s)
wait $! && code=0 || code=$?
seconds=$(($(date +%s) - begin))
grep -E '^train_gdn: |Remote daemon' "$work/err" || true
check "the link is cut: all end, exit code $code, after $seconds s" [ $((code != 0 && seconds < 30)) = 1 ]
# whoever of the two notices first: a rank that waits, or mpirun
check "a line names the other rank or its host" \
  [ "$(grep -Ec '^train_gdn: rank 1 |Remote daemon: .* on node 10.77.0.2' "$work/err")" = 1 ]
# mpirun's own daemon on the other host may live until TCP gives up
left() {
  for pid in $(ip netns pids $a) $(ip netns pids $b); do
    [ "$(cat /proc/"$pid"/comm 2>/dev/null)" != train_gdn ] || echo "$pid"
  done
}
while [ -n "$(left)" ] && [ $(($(date +%s) - begin)) -lt 30 ]; do sleep 0.2; done
check "no rank is left after $(($(date +%s) - begin)) s" [ -z "$(left)" ]
last=$(find "$work/cut" -maxdepth 1 -name 'step_????????' | sort | tail -n 1)
check "the last checkpoint is whole: ${last##*/}" "$train_gdn" -d cpu -gen 3 -load "$last"
echo "$passed passed, $failed failed"
[ $failed = 0 ]
