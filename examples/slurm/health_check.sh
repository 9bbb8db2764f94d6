#!/usr/bin/env bash
# Is this node fit for the job? Run on every node before the start; prints each fault. Exits with 1 if the node is at
# fault, with 2 if a shared directory is.
#
#   health_check.sh DIRECTORY...    where the job writes; one that is not there yet is made, so its parent is looked at
#
# EXPECTED_GPUS       GPUs that the node must show (default: what SLURM gave, else none is required)
# MINIMUM_FREE_GB     free space in each DIRECTORY (default 1; whether a checkpoint fits, training asks itself)
# MAXIMUM_CLOCK_SKEW  seconds between this clock and the file server's (default 5)
set -euo pipefail

: "${1:?usage: health_check.sh DIRECTORY...}"
node="${SLURMD_NODENAME:-$(hostname)}"
faults=()        # of this node
shared_faults=() # of a file system, which other nodes have too

# What nvidia-smi tells of each GPU: that it answers, counts no errors of its memory, and has all of its links.
check_gpus() {
  local expected="${EXPECTED_GPUS:-${SLURM_GPUS_ON_NODE:-0}}" found=0 gpu ecc remapped
  if [ "$expected" -gt 0 ]; then
    found="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
    if [ "$found" -lt "$expected" ]; then
      faults+=("$found of $expected GPUs answer")
    fi
    while IFS=', ' read -r gpu ecc remapped; do
      [[ "$gpu" =~ ^[0-9]+$ ]] || continue # an old driver's word that it does not know a field
      case "$ecc" in
        "" | 0 | *N/A*) ;;
        *) faults+=("GPU $gpu has $ecc uncorrected memory errors") ;;
      esac
      [[ "$remapped" != [Yy]es ]] || faults+=("GPU $gpu waits for a reset to replace rows of its memory")
    done < <(nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total,remapped_rows.pending \
      --format=csv,noheader 2>/dev/null || true)
    if nvidia-smi nvlink --status 2>/dev/null | grep -qi 'inactive'; then
      faults+=("an NVLink is inactive: $(nvidia-smi nvlink --status | grep -ci inactive) in all")
    fi
  fi
}

# Space, a file that can be written, and the file server's clock, which that file carries.
check_directory() {
  local directory="$1" mark free skew
  while [ ! -e "$directory" ]; do
    directory="$(dirname "$directory")"
  done
  mark="$directory/.write-test-$node"
  if ! touch "$mark" 2>/dev/null; then
    shared_faults+=("$1 cannot be written")
    return
  fi
  free="$(df --output=avail --block-size=1G "$directory" | tail -n 1 | tr -d ' ')"
  if [ "$free" -lt "${MINIMUM_FREE_GB:-1}" ]; then
    shared_faults+=("$free GB free in $directory, ${MINIMUM_FREE_GB:-1} GB needed")
  fi
  skew=$(($(date +%s) - $(stat -c %Y "$mark" 2>/dev/null || date +%s)))
  if [ "${skew#-}" -gt "${MAXIMUM_CLOCK_SKEW:-5}" ]; then
    faults+=("the clock is $skew s away from that of the file server of $directory")
  fi
  rm -f "$mark"
}

# The first node of the job listens, all others reach it: what NCCL's and gloo's rendezvous needs of the network.
check_network() {
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${SLURM_ARRAY_JOB_ID:-}" ]; then
    local answer
    if ! answer="$(env -u MEGATRON_RETRO_ENDINGS python -m megatron_retro.cli.main reach 2>&1)"; then
      faults+=("$(tail -n 1 <<<"$answer")")
      if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && getent hosts "$(hostname)" | grep -q '^127\.'; then
        faults+=("its name is a loopback address, out of reach: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")
      fi
    fi
    grep -h 'slow link' <<<"$answer" >&2 || true
  fi
}

check_gpus
for directory in "$@"; do
  check_directory "$directory"
done
check_network
if [ "${#faults[@]}" -gt 0 ]; then
  printf "$node: %s\n" "${faults[@]}" >&2
  echo "$node: not fit; leave it out with: scontrol update NodeName=$node State=DRAIN Reason=health" >&2
fi
if [ "${#shared_faults[@]}" -gt 0 ]; then
  printf "$node: %s\n" "${shared_faults[@]}" >&2
  echo "$node: other nodes have the same directory; make room or open it before the next start" >&2
fi
if [ "${#faults[@]}" -gt 0 ]; then
  exit 1
elif [ "${#shared_faults[@]}" -gt 0 ]; then
  exit 2
fi
echo "$node: fit"
