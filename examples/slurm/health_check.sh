#!/usr/bin/env bash
# Is this node fit for the job? Run on every node before the start; prints each fault and exits 1 if there is one.
#
#   health_check.sh DIRECTORY    DIRECTORY is on the file system that the job writes to
#
# EXPECTED_GPUS       GPUs that the node must show (default: what SLURM gave, else none is required)
# MINIMUM_FREE_GB     free space in DIRECTORY (default 10)
# MAXIMUM_CLOCK_SKEW  seconds between this clock and the file server's (default 5)
set -euo pipefail

directory="${1:?usage: health_check.sh DIRECTORY}"
node="${SLURMD_NODENAME:-$(hostname)}"
faults=()

check_gpus() {
  local expected="${EXPECTED_GPUS:-${SLURM_GPUS_ON_NODE:-0}}" found=0
  if [ "$expected" -gt 0 ]; then
    found="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
    if [ "$found" -lt "$expected" ]; then
      faults+=("$found of $expected GPUs answer")
    fi
    if nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader 2>/dev/null | grep -q '[1-9]'; then
      faults+=("a GPU has uncorrected memory errors")
    fi
  fi
}

check_disk() {
  local free
  if ! touch "$directory/.write-test-$node" 2>/dev/null; then
    faults+=("$directory cannot be written")
    return
  fi
  free="$(df --output=avail --block-size=1G "$directory" | tail -n 1 | tr -d ' ')"
  if [ "$free" -lt "${MINIMUM_FREE_GB:-10}" ]; then
    faults+=("$free GB free in $directory, ${MINIMUM_FREE_GB:-10} GB needed")
  fi
}

check_clock() {
  local skew
  skew=$(($(date +%s) - $(stat -c %Y "$directory/.write-test-$node" 2>/dev/null || date +%s)))
  if [ "${skew#-}" -gt "${MAXIMUM_CLOCK_SKEW:-5}" ]; then
    faults+=("the clock is $skew s away from the file server's")
  fi
}

# The first node of the job listens, all others reach it: what NCCL's and gloo's rendezvous needs of the network.
check_network() {
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${SLURM_ARRAY_JOB_ID:-}" ]; then
    local answer
    if ! answer="$(python -m megatron_retro.cli.main reach 2>&1)"; then
      faults+=("$(tail -n 1 <<<"$answer")")
      if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && getent hosts "$(hostname)" | grep -q '^127\.'; then
        faults+=("its name is a loopback address, which others cannot reach: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")
      fi
    fi
  fi
}

check_gpus
check_disk
check_clock
check_network
rm -f "$directory/.write-test-$node"
if [ "${#faults[@]}" -gt 0 ]; then
  printf "$node: %s\n" "${faults[@]}" >&2
  echo "$node: not fit; leave it out with: scontrol update NodeName=$node State=DRAIN Reason=health" >&2
  exit 1
fi
echo "$node: fit"
