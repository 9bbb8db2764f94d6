#!/usr/bin/env bash
# One stage of the chain, here or in a job: which recipe it takes, which files it reads and writes.
#
#   stage.sh STAGE SIZE [flags]      as in: stage.sh retrofit 48b --dry-run
#
# STAGE  corpus    text -> token files                          any number of workers
#        index     token files -> index and neighbour tables    any number of workers
#        pretrain  the GPT that becomes the Retro of this size
#        retrofit  that GPT with retrieval, trained on
#        instruct  instruction tuning
#        evaluate  question sets (TASKS: which; default: those of the paper's table)
#        report    one page about what was trained: RUNS/report-SIZE.html
# SIZE   878m 2.5b 9.5b 24b 48b, or tiny: a model for trying a cluster without GPUs
#        `pretrain adaptive-1b`: a Retro whose gate decides per chunk whether to read
#        `retrofit hf`: any decoder of Hugging Face that `convert` reads, MODEL is its folder
#
# DATA (default data): text, token files, neighbours, instructions, evaluation sets; RUNS (default runs): runs.
# The settings are in examples/recipes/, what differs by size under its preset.
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
recipes="$(dirname "$slurm")/recipes"
usage="usage: stage.sh STAGE SIZE [flags]"
stage="${1:?$usage}"
size="${2:?$usage}"
shift 2
data="${DATA:-data}"
runs="${RUNS:-runs}"
tokens=(--data-path "$data/tokens/corpus_text_document")
neighbors=(--database-path "$data/retro/database" --neighbor-path "$data/retro/neighbors/corpus")

case "$size" in
  878m) gpt=823m ;;
  2.5b) gpt=2.25b ;;
  9.5b) gpt=8.5b ;;
  24b) gpt=22b ;;
  48b) gpt=43b ;;
  *) gpt="$size" ;;
esac
words=()

published() {
  local tokenizer=(--tokenizer-model "$data/tokenizer.model") tasks task
  local recipe=(--preset "retro-$size" --config "$recipes/$stage.toml")
  case "$stage" in
    corpus)
      words=(preprocess --input "$data/text" --tokenizer-type SentencePieceTokenizer "${tokenizer[@]}")
      words+=(--output-prefix "$data/tokens/corpus" --append-eod)
      ;;
    index) words=(build-retrieval --config "$recipes/index.toml" "${tokenizer[@]}" "${index[@]}") ;;
    pretrain)
      words=(pretrain --preset "gpt-$gpt" --config "$recipes/pretrain.toml" "${tokenizer[@]}" "${tokens[@]}")
      words+=(--save "$runs/gpt-$gpt")
      ;;
    retrofit)
      words=(retrofit "${recipe[@]}" "${tokenizer[@]}" "${tokens[@]}" "${neighbors[@]}")
      words+=(--load "$runs/gpt-$gpt" --save "$runs/retro-$size")
      ;;
    instruct)
      words=(finetune "${recipe[@]}" "${tokenizer[@]}" --instruction-data "$data"/instructions/*.jsonl)
      words+=(--load "$runs/retro-$size" --save "$runs/instruct-$size")
      ;;
    evaluate)
      read -r -a tasks <<<"${TASKS:-nq triviaqa newsqa squad2 squad1 quoref narrativeqa drop}"
      words=(evaluate "${tasks[@]}" "${recipe[@]}" --load "$runs/instruct-$size")
      words+=(--eval-output "$runs/evaluate-$size" --eval-data)
      for task in "${tasks[@]}"; do
        words+=("$task=$data/evaluation/$task.json")
      done
      ;;
    report) report ;;
  esac
}

tiny() {
  local recipe=(--config "$recipes/tiny.toml")
  case "$stage" in
    corpus)
      words=(preprocess --input "$data/text" --output-prefix "$data/tokens/corpus" --append-eod --workers 1)
      ;;
    index) words=(build-retrieval "${recipe[@]}" "${index[@]}") ;;
    pretrain) words=(pretrain "${recipe[@]}" "${tokens[@]}" --save "$runs/gpt-tiny") ;;
    retrofit)
      words=(retrofit "${recipe[@]}" "${tokens[@]}" "${neighbors[@]}" --load "$runs/gpt-tiny" --save "$runs/retro-tiny")
      ;;
    instruct)
      words=(finetune "${recipe[@]}" --retro-attention-gate 0 --seq-length 512 --train-iters 4)
      words+=(--context-place none --skip-long-examples --instruction-data "$data"/instructions/*.jsonl)
      words+=(--load "$runs/retro-tiny" --save "$runs/instruct-tiny")
      ;;
    evaluate)
      words=(evaluate perplexity --load "$runs/retro-tiny" --eval-output "$runs/evaluate-tiny" --perplexity-windows 8)
      ;;
    report) report ;;
  esac
}

report() {
  words=(report "$runs/gpt-$gpt" "$runs/retro-$size" "$runs/instruct-$size" --report-output "$runs/report-$size.html"
    --report-retrieval "$data/retro")
}

adaptive() {
  if [ "$stage" = pretrain ]; then
    words=(pretrain --preset adaptive-retro-1b --config "$recipes/adaptive_1b.toml" "${tokens[@]}" "${neighbors[@]}")
    words+=(--vocab-file "$data/gpt2-vocab.json" --merge-file "$data/gpt2-merges.txt" --save "$runs/adaptive-1b")
  fi
}

hugging_face() {
  local model="${MODEL:?set MODEL to the folder of a Hugging Face decoder}" name
  name="$(basename "$model")"
  if [ "$stage" = retrofit ]; then
    words=(retrofit --config "$recipes/retrofit_hf.toml" "${tokens[@]}" "${neighbors[@]}")
    words+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model/tokenizer.json")
    words+=(--load "$runs/$name" --save "$runs/retro-$name")
    case " $* " in
      *" --print-config "*) ;;
      *" --dry-run "*) words+=(--plan-model "$model") ;; # nothing is converted: the plan reads its config.json
      *) convert "$model" "$runs/$name" ;;
    esac
  fi
}

convert() {
  if [ ! -e "$2" ]; then
    mkdir -p "$runs"
    LAUNCHER=none "$slurm/launch.sh" convert "$1" "$2"
  fi
}

index=(--retro-project-dir "$data/retro" --retro-database-corpus "$data/tokens/corpus_text_document"
  --retro-query-corpus "corpus=$data/tokens/corpus_text_document")
case "$size" in
  878m | 2.5b | 9.5b | 24b | 48b) published ;;
  tiny) tiny ;;
  adaptive-1b) adaptive ;;
  hf) hugging_face "$@" ;;
esac
if [ "${#words[@]}" = 0 ]; then
  echo "error: there is no stage '$stage' of size '$size'; see the head of $slurm/stage.sh" >&2
  exit 2
fi
exec "$slurm/launch.sh" "${words[@]}" "$@"
