#!/usr/bin/env bash
# Submits the whole chain: corpus -> index and neighbours -> GPT -> Retro -> instruction tuning -> evaluation -> report.
#
#   examples/slurm/submit_all.sh SIZE [sbatch options]     from the repository; SIZE: 878m 2.5b 9.5b 24b 48b tiny
#
# Each job starts when the one before it has succeeded (afterok); a job that is preempted or whose node dies is queued
# again and goes on from its last checkpoint. The workers of corpus and index are followed by one job that finishes what
# they left: a lost worker stops nothing. Prints "STAGE JOB" for each.
#
# DATA, RUNS, LOGS, WORKERS, CLUSTER     as in submit.sh
# STAGES                                 some of: corpus index pretrain retrofit instruct evaluate report (default: all)
#
# DATA must hold text/ (JSON lines), tokenizer.model, instructions/*.jsonl and evaluation/TASK.json. For `tiny` what is
# missing is made of the standard library, which every machine has.
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
size="${1:?usage: submit_all.sh SIZE [sbatch options]}"
shift
read -r -a stages <<<"${STAGES:-corpus index pretrain retrofit instruct evaluate report}"
cd "$slurm/../.."

# A dozen documents of the standard library, and questions about it.
make_tiny_data() {
  local data="${DATA:-data}" all
  all="$(mktemp -d)"
  LAUNCHER=none "$slurm/launch.sh" collect-text --collect-output "$all"
  mkdir -p "$data/text" "$data/instructions"
  sed -n '1~50p;600q' "$all/train.jsonl" >"$data/text/library.jsonl"
  sed -n '1~10p;600q' "$all/train_questions.jsonl" >"$data/instructions/library.jsonl"
  rm -r "$all"
}

if [ "$size" = tiny ] && [ ! -e "${DATA:-data}/text" ]; then
  make_tiny_data >&2
fi
after=()
for stage in "${stages[@]}"; do
  job="$("$slurm/submit.sh" "$stage" "$size" --kill-on-invalid-dep=yes "${after[@]}" "$@")"
  echo "$stage $job"
  case "$stage" in
    corpus | index)
      job="$(FINISH=on "$slurm/submit.sh" "$stage" "$size" "--dependency=afterany:$job" "$@")"
      echo "$stage-finish $job"
      ;;
  esac
  after=("--dependency=afterok:$job")
done
