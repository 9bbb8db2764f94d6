#!/usr/bin/env bash
# What the recipes of one kind have in common, whatever their size: which files a stage reads and writes.
#
#   stage.sh pretrain_gpt 43b           [flags]
#   stage.sh retrofit 48b from 43b      [flags]
#   stage.sh instruct 48b               [flags]
#   stage.sh evaluate 48b               [flags]    TASKS: the sets (default: those of the paper's table)
#
# The settings are in STAGE_SIZE.toml beside the recipe. DATA (default data): token files, neighbours, instructions,
# evaluation sets; RUNS (default runs): where runs live.
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
stage="${1:?usage: stage.sh STAGE SIZE [flags]}"
size="${2:?usage: stage.sh STAGE SIZE [flags]}"
shift 2
data="${DATA:-data}"
runs="${RUNS:-runs}"
choices=(--config "$slurm/../${stage}_$size.toml")
tokenizer=(--tokenizer-model "$data/tokenizer.model")
tokens=(--data-path "$data/tokens/corpus_text_document")

case "$stage" in
  pretrain_gpt)
    words=(pretrain "${choices[@]}" "${tokenizer[@]}" "${tokens[@]}" --save "$runs/gpt-$size")
    ;;
  retrofit)
    gpt="${2:?usage: stage.sh retrofit SIZE from GPT-SIZE [flags]}"
    shift 2
    words=(retrofit "${choices[@]}" "${tokenizer[@]}" "${tokens[@]}")
    words+=(--database-path "$data/retro/database" --neighbor-path "$data/retro/neighbors/corpus")
    words+=(--load "$runs/gpt-$gpt" --save "$runs/retro-$size")
    ;;
  instruct)
    words=(finetune "${choices[@]}" "${tokenizer[@]}" --instruction-data "$data"/instructions/*.jsonl)
    words+=(--load "$runs/retro-$size" --save "$runs/instruct-$size")
    ;;
  evaluate)
    read -r -a tasks <<<"${TASKS:-nq triviaqa newsqa squad2 squad1 quoref narrativeqa drop}"
    words=(evaluate "${tasks[@]}" "${choices[@]}")
    words+=(--load "$runs/instruct-$size" --eval-output "$runs/evaluate-$size" --eval-data)
    for task in "${tasks[@]}"; do
      words+=("$task=$data/evaluation/$task.json")
    done
    ;;
  *)
    echo "error: $stage is no stage; pretrain_gpt, retrofit, instruct or evaluate" >&2
    exit 2
    ;;
esac
exec "$slurm/launch.sh" "${words[@]}" "$@"
