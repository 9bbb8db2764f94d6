#!/usr/bin/env bash
# Submits the whole chain: corpus -> index and neighbours -> GPT -> Retro -> instruction tuning -> evaluation.
#
#   examples/slurm/submit_all.sh SIZE [sbatch options]     from the repository; SIZE: 878m 2.5b 9.5b 24b 48b tiny
#
# Each job starts when the one before it has succeeded (afterok); a job that is preempted or whose node dies is queued
# again and goes on from its last checkpoint. Prints "STAGE JOB" for each.
#
# DATA, RUNS, LOGS, WORKERS, CLUSTER     as in submit.sh
# STAGES                                 some of: corpus index pretrain retrofit instruct evaluate (default: all)
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
size="${1:?usage: submit_all.sh SIZE [sbatch options]}"
shift
read -r -a stages <<<"${STAGES:-corpus index pretrain retrofit instruct evaluate}"
cd "$slurm/../.."
after=()
for stage in "${stages[@]}"; do
  job="$("$slurm/submit.sh" "$stage" "$size" --kill-on-invalid-dep=yes "${after[@]}" "$@")"
  echo "$stage $job"
  after=("--dependency=afterok:$job")
done
