#!/usr/bin/env bash
# Submits the whole chain: corpus -> index and neighbours -> GPT -> Retro -> instruction tuning -> evaluation.
#
#   examples/slurm/submit_all.sh SIZE [sbatch options]     from the repository; SIZE: 878m 2.5b 9.5b 24b 48b tiny
#
# Each job starts when the one before it has succeeded (afterok); a job that is preempted or whose node dies is queued
# again and goes on from its last checkpoint. Prints "STAGE JOB" for each.
#
# DATA, RUNS, LOGS     where things are, as the recipes say
# WORKERS              workers of the corpus and index stages (default 16)
# STAGES               some of: corpus index gpt retro instruct evaluate (default: all)
set -euo pipefail

examples="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
size="${1:?usage: submit_all.sh SIZE [sbatch options]}"
shift
options=("$@")
workers="${WORKERS:-16}"
read -r -a stages <<<"${STAGES:-corpus index gpt retro instruct evaluate}"

gpt_of() {
  case "$1" in
    878m) echo 823m ;;
    2.5b) echo 2.25b ;;
    9.5b) echo 8.5b ;;
    24b) echo 22b ;;
    48b) echo 43b ;;
    tiny) echo tiny ;;
    *)
      echo "error: $1 is no size; 878m, 2.5b, 9.5b, 24b, 48b or tiny" >&2
      return 2
      ;;
  esac
}

# The script of a stage, and what else sbatch is told of it.
recipe() {
  local data="$examples/build_retrieval_data.sh"
  if [ -e "$examples/build_retrieval_data_$size.sh" ]; then
    data="$examples/build_retrieval_data_$size.sh"
  fi
  case "$1" in
    corpus | index) echo "$data" ;;
    gpt) echo "$examples/pretrain_gpt_$gpt.sh" ;;
    retro) echo "$examples/retrofit_$size.sh" ;;
    instruct) echo "$examples/instruct_$size.sh" ;;
    evaluate) echo "$examples/evaluate_$size.sh" ;;
    *)
      echo "error: $1 is no stage; corpus, index, gpt, retro, instruct or evaluate" >&2
      return 2
      ;;
  esac
}

submit() {
  local stage="$1" after="$2" script
  local -a words=(--parsable --kill-on-invalid-dep=yes "--export=ALL,STAGE=$stage")
  script="$(recipe "$stage")"
  if [ -n "$after" ]; then
    words+=("--dependency=afterok:$after")
  fi
  if [ "$stage" = corpus ] || [ "$stage" = index ]; then
    words+=("--array=0-$((workers - 1))")
  fi
  sbatch "${words[@]}" "${options[@]}" "$script" | cut -d ';' -f 1
}

gpt="$(gpt_of "$size")"
cd "$examples/.."
before=""
for stage in "${stages[@]}"; do
  before="$(submit "$stage" "$before")"
  echo "$stage $before"
done
