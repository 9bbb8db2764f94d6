#!/usr/bin/env bash
# A study of examples/studies: makes what it needs beside the quickstart's files, and runs it.
#
#   study.sh NAME [flags]     one worker, whose runs are processes of their own; `submit.sh study NAME` has several
#
# DATA (default runs/quickstart): the directory that examples/quickstart.sh made. What some need besides:
#   encoder_ablation, peft_study   CONVERSATIONS, HELD_OUT: files of conversations to train and to measure on
#   prose                          TEXT: JSON lines with "text", to train on and to search in; HELD_OUT_TEXT: to measure
#                                  on (default: each 20th line of TEXT); DATA (default runs/prose) is its own
#   peft_study_published           DATA (default: here) holds runs/, what pretraining and retro-fitting saved, and
#                                  data/peft/SET.{train,valid}.jsonl; each run takes the eight GPUs of a node
set -euo pipefail

slurm="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name="${1:?usage: study.sh NAME [flags]}"
shift
export PROCESSES=1
examples="$(dirname "$slurm")"
recipe="$examples/studies/$name.toml"
if [ ! -f "$recipe" ]; then
  echo "error: there is no study $name; they are in $examples/studies" >&2
  exit 2
fi
words=(ablate --config "$recipe")
case " $* " in
  *" --dry-run "* | *" --print-config "*) exec "$slurm/launch.sh" "${words[@]}" "$@" ;; # nothing is made
esac
train=corpus/train_text_document
held_out=corpus/held_out_text_document
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/tokenizer.model)

build() { # directory of the project, the table that is made last, flags
  local project="$1" last="$2"
  shift 2
  if [ ! -e "$project/neighbors/$last" ]; then
    "$slurm/launch.sh" build-retrieval --retro-project-dir "$project" --retro-chunk-length 32 \
      --retro-index-str IVF256,Flat --retro-tasks train encode merge query "${tokenizer[@]}" "$@"
  fi
}

tokenize() { # name of a file in corpus/
  if [ ! -f "corpus/${1}_text_document.manifest.json" ]; then
    "$slurm/launch.sh" preprocess --input "corpus/$1.jsonl" --output-prefix "corpus/$1" --append-eod "${tokenizer[@]}"
  fi
}

# Retrievers to compare, small, for a text encoder takes minutes even so: a quarter of the database, a 26th of the
# training text, a quarter of the held-out text. Tables in the embedder's order, and re-ranked by BM25, from one index.
build_small() { # directory of the project, flags
  local project="$1" order suffix
  shift
  for order in none bm25; do
    suffix="${order/#none/}"
    suffix="${suffix:+-$suffix}"
    build "$project" "held_out$suffix" --retro-database-corpus "$train" --retro-database-documents 0:190 \
      --retro-rerank "$order" --retro-query-corpus "held_out$suffix=$held_out" --retro-query-rows 0:1600 "$@"
    build "$project" "train$suffix" --retro-database-corpus "$train" --retro-database-documents 0:190 \
      --retro-rerank "$order" --retro-query-corpus "train$suffix=$train" \
      --retro-query-rows 0:1200 32000:33200 64000:65200 96000:97200 "$@"
  done
}

# The corpus cut by source, each a token file of its own in one database.
split_by_source() {
  local source
  for source in reference codecs library; do
    if [ ! -f "corpus/${source}_text_document.manifest.json" ]; then
      case "$source" in
        reference) grep '^{"id": "topic ' corpus/train.jsonl >corpus/reference.jsonl ;;
        codecs) grep '^{"id": "encodings/' corpus/train.jsonl >corpus/codecs.jsonl ;;
        library) grep -v -e '^{"id": "topic ' -e '^{"id": "encodings/' corpus/train.jsonl >corpus/library.jsonl ;;
      esac
      tokenize "$source"
    fi
  done
}

# Files and a GPT of the quickstart's form, on any text.
make_prose() {
  if [ ! -f corpus/tokenizer.model ]; then
    if [ -n "$held_out_text" ]; then
      cp "$text" corpus/train.jsonl
      cp "$held_out_text" corpus/held_out.jsonl
    else
      awk 'NR % 20 != 10' "$text" >corpus/train.jsonl
      awk 'NR % 20 == 10' "$text" >corpus/held_out.jsonl
    fi
    "$slurm/launch.sh" train-tokenizer --input corpus/train.jsonl --tokenizer-output corpus/tokenizer \
      --tokenizer-vocab-size 2048
  fi
  tokenize train
  tokenize held_out
  if [ ! -e retrieval/neighbors/held_out ]; then
    "$slurm/launch.sh" build-retrieval --retro-project-dir retrieval --retro-chunk-length 32 "${tokenizer[@]}" \
      --retro-tasks train encode merge query --retro-database-corpus "$train" \
      --retro-query-corpus "train=$train" "held_out=$held_out"
  fi
  "$slurm/launch.sh" pretrain --config "$examples/quickstart.toml" "${tokenizer[@]}" --data-path "$train" \
    --valid-data-path "$held_out" --train-iters 500 --save gpt
}

require_conversations() {
  local file
  for file in "${CONVERSATIONS:?set it to a file of conversations to train on}" \
    "${HELD_OUT:?set it to a file of conversations to measure on}"; do
    if [ ! -f "$file" ]; then
      echo "error: there is no $file (looked for in $PWD)" >&2
      exit 2
    fi
  done
  words+=(--instruction-data "$CONVERSATIONS" --instruction-valid-data "$HELD_OUT")
}

case "$name" in
  prose)
    text="$(realpath "${TEXT:?set it to a file of JSON lines}")"
    held_out_text="${HELD_OUT_TEXT:+$(realpath "$HELD_OUT_TEXT")}"
    DATA="${DATA:-$examples/../runs/prose}"
    mkdir -p "$DATA/corpus"
    ;;
  peft_study_published) DATA="${DATA:-.}" ;;
esac
cd "${DATA:-$examples/../runs/quickstart}"
case "$name" in
  prose) make_prose ;;
  ablate_database_size)
    build retrieval100 train --retro-query-num-neighbors-save 100 --retro-database-corpus "$train" \
      --retro-query-corpus "held_out=$held_out" "train=$train"
    ;;
  retriever_quality)
    for order in none overlap bm25; do
      project="retrieval-$order" saved=20
      if [ "$order" = none ]; then
        project=retrieval100 saved=100
      fi
      build "$project" held_out --retro-rerank "$order" --retro-query-num-neighbors-save "$saved" \
        --retro-database-corpus "$train" --retro-query-corpus "held_out=$held_out"
    done
    ;;
  retriever_kinds | retriever_training)
    build_small retrieval-small-hashed
    build_small retrieval-small-minilm --retro-embedder minilm --retro-embedder-precision bf16
    ;;
  composition)
    split_by_source
    build retrieval-sources held_out --retro-query-num-neighbors-save 100 \
      --retro-database-corpus corpus/reference_text_document corpus/codecs_text_document corpus/library_text_document \
      --retro-query-corpus "held_out=$held_out"
    ;;
  encoder_ablation | peft_study) require_conversations ;;
esac
exec "$slurm/launch.sh" "${words[@]}" "$@"
