#!/usr/bin/env bash
# Starts a verb of megatron-retro wherever this runs: `launch.sh VERB [flags]`. No other file names a launcher.
#
#   inside a SLURM job     srun, one task per process, from SLURM's variables; health check first; requeues on code 75
#   elsewhere              torchrun over PROCESSES processes (default: one per GPU, else one), or plain for one
#   LAUNCHER=mpirun        mpirun with PROCESSES ranks; LAUNCHER=torchrun, srun or none forces the others
#   --dry-run              starts nothing: prints the plan (`megatron-retro plan`) of what would run
#   --print-config         starts nothing: prints the effective settings
#   --container-*          goes to srun (Enroot/Pyxis); so does everything in SRUN_OPTIONS
#
# CLUSTER                 profile of the cluster (default: cluster.env beside this file): modules, container, interfaces
# LOGS (default logs)     per job: LOGS/NAME-JOB/rank-N.log
# MAIL_TO                 address that gets one summary line at the end
# HEALTH_CHECK=off        skips the check of the nodes
# torchrun over several machines without SLURM: NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each
set -euo pipefail

exit_requeue=75
slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
home="$(cd "$slurm/../.." && pwd)"
# shellcheck source=examples/slurm/profile.sh
source "$slurm/profile.sh"
if [ -x "$home/.venv/bin/python" ] && ! command -v megatron-retro >/dev/null; then
  export PATH="$home/.venv/bin:$PATH"
fi
program=(python -m megatron_retro.cli.main)
containers=(${CONTAINER_IMAGE:+"--container-image=$CONTAINER_IMAGE"}
  ${CONTAINER_MOUNTS:+"--container-mounts=$CONTAINER_MOUNTS"})
words=()
written=() # the directory of --save
cores=()
declare -A told_before=() # bytes of each rank's log that earlier starts wrote
dry_run=false

main() {
  local verb="${1:?usage: launch.sh VERB [flags]}" word before=""
  shift
  for word in "$@"; do
    [ "$before" != --save ] || written=("$word")
    before="$word"
    case "$word" in
      --dry-run) dry_run=true ;;
      --print-config) LAUNCHER=none; words+=("$word") ;;
      --container-*) containers+=("$word") ;;
      *) words+=("$word") ;;
    esac
  done
  if "$dry_run"; then
    exec "${program[@]}" plan --plan-for "$verb" "${words[@]}"
  fi
  load_modules
  # Memory in pieces costs a run its last gigabytes. torch reads this on GPUs, but PYTORCH_CUDA_ALLOC_CONF first.
  export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
  case "$(launcher "$verb")" in
    srun) run_in_slurm "$verb" ;;
    torchrun) run_with_torchrun "$verb" ;;
    mpirun) exec mpirun -n "${PROCESSES:-$(devices)}" "${program[@]}" "$verb" "${words[@]}" ;;
    none) exec "${program[@]}" "$verb" "${words[@]}" ;;
    *)
      echo "error: LAUNCHER=${LAUNCHER:-} is no launcher; srun, torchrun, mpirun or none" >&2
      exit 2
      ;;
  esac
}

launcher() {
  if [ -n "${LAUNCHER:-}" ]; then
    echo "$LAUNCHER"
  elif [ -n "${SLURM_JOB_ID:-}" ]; then
    echo srun
  elif [ "${NODES:-1}" -gt 1 ] || [ "${PROCESSES:-$(devices)}" -gt 1 ]; then
    echo torchrun
  else
    echo none
  fi
}

devices() {
  local count=0
  if command -v nvidia-smi >/dev/null; then
    count="$(nvidia-smi --list-gpus | wc -l)"
  fi
  echo $((count > 0 ? count : 1))
}

run_with_torchrun() {
  local -a rdzv=(--standalone)
  if [ "${NODES:-1}" -gt 1 ]; then
    rdzv=(--nnodes "$NODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
      --master-port "${MASTER_PORT:-29500}")
  fi
  exec torchrun "${rdzv[@]}" --nproc-per-node "${PROCESSES:-$(devices)}" -m megatron_retro.cli.main "$1" "${words[@]}"
}

run_in_slurm() {
  local verb="$1" status=0 begin logs log
  local -a options=()
  logs="${LOGS:-logs}/${SLURM_JOB_NAME:-job}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
  mkdir -p "$logs"
  read -r -a options <<<"${SRUN_OPTIONS:-}"
  options+=(--kill-on-bad-exit=1 "${containers[@]}")
  begin="$(date +%s)"
  if [ "${HEALTH_CHECK:-on}" != off ]; then
    # One task per node; a node that fails ends the job before anything is built.
    srun "${options[@]}" --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
      "$slurm/health_check.sh" "$logs" "${written[@]}" || status=$?
  fi
  for log in "$logs"/*rank-*.log; do
    [ ! -f "$log" ] || told_before["$log"]="$(stat -c %s "$log")"
  done
  if [ "$status" = 0 ]; then
    read_cores
    srun "${options[@]}" "${cores[@]}" --open-mode=append \
      --output="$logs/${SLURM_ARRAY_TASK_ID:+task-$SLURM_ARRAY_TASK_ID-}rank-%t.log" \
      "${program[@]}" "$verb" "${words[@]}" || status=$?
  fi
  finish "$verb" "$status" "$(($(date +%s) - begin))" "$logs"
}

# srun forgets --cpus-per-task of the job; where the job does not say, its tasks share the cores of a node evenly.
read_cores() {
  local count="${SLURM_CPUS_PER_TASK:-}"
  if [ -z "$count" ] && [ -n "${SLURM_NTASKS_PER_NODE:-}" ] &&
    [[ "${SLURM_JOB_CPUS_PER_NODE:-}" =~ ^([0-9]+)(\(x[0-9]+\))?$ ]]; then
    count=$((BASH_REMATCH[1] / SLURM_NTASKS_PER_NODE))
  fi
  if [ "${count:-0}" -gt 0 ]; then
    cores=("--cpus-per-task=$count")
  fi
}

finish() {
  local verb="$1" status="$2" seconds="$3" logs="$4" outcome line
  case "$status" in
    0) outcome=finished ;;
    "$exit_requeue") outcome="saved, starts again" ;;
    *) outcome="failed with code $status" ;;
  esac
  line="$verb ${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID}: $outcome after ${seconds} s on ${SLURM_JOB_NUM_NODES:-1} nodes"
  line+=", start ${SLURM_RESTART_COUNT:-0}; logs in $logs; $(last_line "$logs" "$status")"
  echo "$line"
  if [ -n "${MAIL_TO:-}" ] && [ "$status" != "$exit_requeue" ]; then
    mail -s "$line" "$MAIL_TO" <<<"$line" || echo "the mail to $MAIL_TO was not sent" >&2
  fi
  if [ "$status" = "$exit_requeue" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

# Of a start that failed, its first error, whole; else what the first rank said last.
last_line() {
  local ranks="$1/${SLURM_ARRAY_TASK_ID:+task-$SLURM_ARRAY_TASK_ID-}rank-" status="$2" log error
  if [ "$status" != 0 ]; then
    # A rank that failed has written its error last, so the log that was changed first has the first error.
    while IFS= read -r log; do
      error="$(tail -c "+$((${told_before[$log]:-0} + 1))" "$log" | first_error)"
      if [ -n "$error" ]; then
        echo "$error"
        return
      fi
    done < <(grep -l '^error: ' "$ranks"*.log 2>/dev/null | xargs -r -d '\n' stat -c '%.9Y %n' | sort -n |
      cut -d' ' -f2-)
  fi
  if [ -s "${ranks}0.log" ]; then
    tail -n 1 "${ranks}0.log"
  else
    echo "no output"
  fi
}

# The first error of a log with what was got, what was expected and what mends it, on one line.
first_error() {
  awk '/^error: / { line = $0; next }
    line != "" && /^  / { sub(/^ +/, ""); line = line "; " $0; next }
    line != "" { exit }
    END { print line }'
}

main "$@"
