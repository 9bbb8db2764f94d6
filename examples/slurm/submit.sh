#!/usr/bin/env bash
# Submits one stage, or a study, with the nodes that its recipe is planned for; prints the number of the job.
#
#   submit.sh STAGE SIZE [sbatch options] [-- flags]     as in: submit.sh retrofit 9.5b --time=2-0 -- --train-iters 1000
#   submit.sh study NAME [sbatch options] [-- flags]     as in: submit.sh study findings
#
# STAGE, SIZE, DATA, RUNS   as in stage.sh; NAME as in study.sh
# WORKERS                   jobs of the array that shares corpus, index (default 16) or study (default 4)
# FINISH=on                 one job without an array: it finishes what the workers of corpus or index left, and checks it
# CLUSTER                   profile of the cluster (default: cluster.env beside this file): account, partition, ...
#
# A job that is preempted or whose node dies is queued again and goes on from its last checkpoint.
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=examples/slurm/profile.sh
source "$slurm/profile.sh"
usage="usage: submit.sh STAGE SIZE [sbatch options] [-- flags]"
stage="${1:?$usage}"
size="${2:?$usage}"
shift 2
given=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
  given+=("$1")
  shift
done
[ "$#" = 0 ] || shift

options=(--parsable "--job-name=$stage-$size" --requeue --open-mode=append --output=%x-%j.log --signal=B:USR1@300
  "--mail-type=END,FAIL")
if [ "$stage" = study ]; then
  command=("$slurm/study.sh" "$size" "$@")
else
  command=("$slurm/stage.sh" "$stage" "$size" "$@")
fi

# What the plan of this stage is for; settings that cannot be are refused here, before anything is queued.
settings="" # of a finishing job, its array was asked for the same
[ -n "${FINISH:-}" ] || settings="$("${command[@]}" --dry-run --print-config)"
nodes="$(awk '$1 == "plan_nodes" { print $3 }' <<<"$settings")"
gpus="$(awk '$1 == "plan_gpus_per_node" { print $3 }' <<<"$settings")"
with_gpus="--gpus-per-node=${GPU_TYPE:+$GPU_TYPE:}$gpus"
whole_nodes=(--exclusive --mem=0)
[ "$size" != tiny ] || whole_nodes=()

case "${FINISH:+finish-}$stage-$size" in
  finish-*) options+=(--nodes=1 --ntasks-per-node=1 "${whole_nodes[@]}") ;;
  corpus-* | index-*)
    options+=(--nodes=1 --ntasks-per-node=1 "--array=0-$((${WORKERS:-16} - 1))" "${whole_nodes[@]}")
    ;;
  study-prose) options+=(--nodes=1 --ntasks-per-node=1) ;; # it makes its files first, which workers cannot share
  study-*)
    options+=(--nodes=1 --ntasks-per-node=1 "--array=0-$((${WORKERS:-4} - 1))")
    [ "$gpus" = 1 ] || options+=("$with_gpus")
    ;;
  report-* | evaluate-tiny) options+=(--nodes=1 --ntasks-per-node=1) ;;
  *-tiny) options+=("--nodes=$nodes" "--ntasks-per-node=$gpus") ;;
  *) options+=("--nodes=$nodes" "--ntasks-per-node=$gpus" "$with_gpus" "${whole_nodes[@]}") ;;
esac
read_sbatch_options
options+=("${profile_options[@]}")
sbatch "${options[@]}" "${given[@]}" --wrap "exec $(printf '%q ' "${command[@]}")" | cut -d ';' -f 1
