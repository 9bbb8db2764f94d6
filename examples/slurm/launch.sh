#!/usr/bin/env bash
# Starts a verb of megatron-retro wherever this runs: `launch.sh VERB [flags]`. No other file names a launcher.
#
#   inside a SLURM job     srun, one task per process, from SLURM's variables; health check first; queues the job again
#                          when it was asked to stop, and after failures while checkpoints advance (outcome.sh)
#   elsewhere              torchrun over PROCESSES processes (default: one per GPU, else one), or plain for one
#   LAUNCHER=mpirun        mpirun with PROCESSES ranks; LAUNCHER=torchrun, srun or none forces the others
#   --dry-run              starts nothing: prints the plan (`megatron-retro plan`) of what would run
#   --print-config         starts nothing: prints the effective settings
#   --container-*          goes to srun (Enroot/Pyxis); so does everything in SRUN_OPTIONS
#   CONTAINER_IMAGE        an image in which the work runs: FILE.sif by apptainer, any other by srun (Enroot/Pyxis)
#
# ENVIRONMENT             virtual environment to use (default: .venv of the repository, if megatron-retro is not on PATH)
# CLUSTER                 profile of the cluster (default: cluster.env beside this file): modules, container, interfaces
# LOGS (default logs)     per job: LOGS/NAME-JOB/rank-N.log
# MAIL_TO                 address that gets one summary line at the end
# HEALTH_CHECK=off        skips the check of the nodes
# MAX_FAILURES            starts again after at most so many failures (default 5; 0: never)
# LEAVE_SECONDS           ranks that are still there so long after another one failed are killed (default 60)
# torchrun over several machines without SLURM: NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
home="$(cd "$slurm/../.." && pwd)"
# shellcheck source=examples/slurm/profile.sh
source "$slurm/profile.sh"
# shellcheck source=examples/slurm/outcome.sh
source "$slurm/outcome.sh"
environment="${ENVIRONMENT:-$home/.venv}"
if [ -x "$environment/bin/python" ] && { [ -n "${ENVIRONMENT:-}" ] || ! command -v megatron-retro >/dev/null; }; then
  export PATH="$environment/bin:$PATH"
fi
program=(python -m megatron_retro.cli.main)
containers=() # what srun is told of an image
inside=()     # what starts a program in one that srun does not know
if [ -n "${CONTAINER_IMAGE:-}" ]; then # the scripts and the directory of the submission are seen inside, too
  mounts="${CONTAINER_MOUNTS:+$CONTAINER_MOUNTS,}$home:$home,$PWD:$PWD"
  case "$CONTAINER_IMAGE" in
    *.sif)
      read -r -a inside <<<"apptainer exec ${APPTAINER_OPTIONS:---nv}"
      inside+=(--bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE")
      ;;
    *) containers=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
  esac
fi
words=()
written=() # the directory of --save
outputs=() # other directories that the verb writes
cores=()
declare -A told_before=() # bytes of each rank's log that earlier starts wrote
dry_run=false
logs="" endings="" task=""
step="" steps=-1 # srun's process, and the number of its step
outcome=0

main() {
  local verb="${1:?usage: launch.sh VERB [flags]}" word setting before=""
  shift
  for word in "$@"; do
    setting="$before=$word"
    [[ "$word" != --*=* ]] || setting="$word"
    case "$setting" in
      --save=*) written=("${setting#*=}") ;;
      --retro-project-dir=* | --eval-output=*) outputs+=("${setting#*=}") ;;
      --output-prefix=*) outputs+=("$(dirname "${setting#*=}")") ;;
    esac
    before="${word%%=*}"
    [ "$before" = "$word" ] || before=""
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
    mpirun) exec mpirun -n "$(processes "$verb")" "${program[@]}" "$verb" "${words[@]}" ;;
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
  elif [ "${NODES:-1}" -gt 1 ] || [ "$(processes "$1")" -gt 1 ]; then
    echo torchrun
  else
    echo none
  fi
}

# Of this node: a rank for each GPU where ranks are what a verb is shared by.
processes() {
  case "$1" in
    pretrain | retrofit | finetune | evaluate | reach) echo "${PROCESSES:-$(devices)}" ;;
    *) echo "${PROCESSES:-1}" ;;
  esac
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
  exec torchrun "${rdzv[@]}" --nproc-per-node "$(processes "$1")" -m megatron_retro.cli.main "$1" "${words[@]}"
}

run_in_slurm() {
  local verb="$1" begin log
  local -a options=()
  logs="${LOGS:-logs}/${SLURM_JOB_NAME:-job}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
  task="${SLURM_ARRAY_TASK_ID:+task-$SLURM_ARRAY_TASK_ID-}"
  mkdir -p "$logs"
  endings="$(cd "$logs" && pwd)/endings/${task}start-${SLURM_RESTART_COUNT:-0}"
  rm -rf "$endings"
  mkdir -p "$endings"
  trap 'asked_to_stop TERM' TERM
  trap 'asked_to_stop USR1' USR1
  read -r -a options <<<"${SRUN_OPTIONS:-}"
  options+=(--kill-on-bad-exit=0 "${containers[@]}")
  begin="$(date +%s)"
  if [ "${HEALTH_CHECK:-on}" != off ]; then
    # One task per node; a node that fails ends the job before anything is built.
    run_step srun "${options[@]}" --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
      "$slurm/rank.sh" "$endings" "${inside[@]}" "$slurm/health_check.sh" "$logs" "${written[@]}" "${outputs[@]}"
    read_outcome "$endings" "$status" "$SLURM_JOB_NUM_NODES"
    # An unfit node is to blame, as one that leaves no word.
    grep -lsE '"code": 1\b' "$endings"/rank-*.json | xargs -r -d '\n' rm || true
  fi
  for log in "$logs"/*rank-*.log; do
    [ ! -f "$log" ] || told_before["$log"]="$(stat -c %s "$log")"
  done
  if [ -e "$endings/stop" ]; then
    outcome="$exit_requeue"
  elif [ "$outcome" = 0 ]; then
    rm -f "$endings"/rank-*
    read_cores
    run_step srun "${options[@]}" "${cores[@]}" --open-mode=append --output="$logs/${task}rank-%t.log" \
      "$slurm/rank.sh" "$endings" "${inside[@]}" "${program[@]}" "$verb" "${words[@]}"
    read_outcome "$endings" "$status" "${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}}"
  fi
  finish "$verb" "$outcome" "$(($(date +%s) - begin))"
}

# A signal to this script alone, or before its step is there.
asked_to_stop() {
  if [ ! -e "$endings/stop" ]; then
    echo "$1 $(hostname)" >"$endings/stop.launch" && mv "$endings/stop.launch" "$endings/stop" || true
  fi
  if [ -n "$step" ]; then
    scancel "--signal=$1" "$SLURM_JOB_ID.$steps" 2>/dev/null || true
  fi
}

# Runs srun so that signals are heard meanwhile. When a rank has failed, the others get LEAVE_SECONDS to notice.
run_step() {
  local failed_at=0
  status=0
  steps=$((steps + 1))
  "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    sleep 0.5 &
    wait "$!" || true
    if [ "$failed_at" = 0 ] && grep -qsE '"code": *[1-9]' "$endings"/rank-*.json; then
      failed_at="$SECONDS"
    elif [ "$failed_at" != 0 ] && [ $((SECONDS - failed_at)) -ge "${LEAVE_SECONDS:-60}" ]; then
      echo "ranks are still there ${LEAVE_SECONDS:-60} s after another one ended: they are killed" >&2
      scancel --signal=KILL "$SLURM_JOB_ID.$steps" 2>/dev/null || true
      failed_at="$SECONDS"
    fi
  done
  wait "$step" || status=$?
  step=""
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
  local verb="$1" code="$2" seconds="$3" words line again=false reason="" failures="$logs/endings/${task}failures"
  case "$code" in
    0)
      words=finished
      if is_past_its_limit; then
        words="finished after its time limit, starts again" again=true
      fi
      ;;
    "$exit_requeue") words="saved, starts again" again=true ;;
    *) words="failed with code $code" ;;
  esac
  if is_failure "$code" && may_try_again "$failures" "$endings" "${written[0]:-}" "$code"; then
    again=true
  fi
  if "$again" && was_cancelled; then
    words="cancelled" again=false
  fi
  line="$verb ${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID}: $words after ${seconds} s on ${SLURM_JOB_NUM_NODES:-1} nodes"
  line+=", start ${SLURM_RESTART_COUNT:-0}${reason:+; $reason}; logs in $logs; $(last_line "$logs" "$code")"
  echo "$line"
  if [ -n "${MAIL_TO:-}" ] && ! "$again"; then
    mail -s "$line" "$MAIL_TO" <<<"$line" || echo "the mail to $MAIL_TO was not sent" >&2
  fi
  if "$again"; then
    requeue "$failures"
  fi
  exit "$code"
}

# Of a start that failed, its first error, whole; else what the first rank said last.
last_line() {
  local ranks="$1/${task}rank-" status="$2" log error
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
