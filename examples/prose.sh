#!/usr/bin/env bash
# Does retrieval help on other text? A GPT and a Retro of the quickstart's size on any text, one JSON object with "text" per line.
#   TEXT=FILE            to train on, and the database; HELD_OUT_TEXT=FILE: to measure on (default: each 20th line of TEXT)
#   DATA=DIR             where everything goes (default: runs/prose)
#SBATCH --job-name=prose
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
text="$(realpath "${TEXT:?set it to a file of JSON lines}")"
held_out="${HELD_OUT_TEXT:+$(realpath "$HELD_OUT_TEXT")}"
export DATA="${DATA:-$here/../runs/prose}" PROCESSES=1
mkdir -p "$DATA/corpus"
DATA="$(realpath "$DATA")"
cd "$DATA"
launch="$here/slurm/launch.sh"
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/tokenizer.model)

if [ ! -f corpus/tokenizer.model ]; then
  if [ -n "$held_out" ]; then
    cp "$text" corpus/train.jsonl
    cp "$held_out" corpus/held_out.jsonl
  else
    awk 'NR % 20 != 10' "$text" >corpus/train.jsonl
    awk 'NR % 20 == 10' "$text" >corpus/held_out.jsonl
  fi
  "$launch" train-tokenizer --input corpus/train.jsonl --tokenizer-output corpus/tokenizer --tokenizer-vocab-size 2048
fi
for part in train held_out; do
  if [ ! -f "corpus/${part}_text_document.manifest.json" ]; then
    "$launch" preprocess --input "corpus/$part.jsonl" --output-prefix "corpus/$part" --append-eod "${tokenizer[@]}"
  fi
done
if [ ! -e retrieval/neighbors/held_out ]; then
  "$launch" build-retrieval --retro-project-dir retrieval --retro-chunk-length 32 --retro-tasks train encode merge query \
    "${tokenizer[@]}" --retro-database-corpus corpus/train_text_document \
    --retro-query-corpus train=corpus/train_text_document held_out=corpus/held_out_text_document
fi
"$launch" pretrain --config "$here/quickstart.toml" "${tokenizer[@]}" --data-path corpus/train_text_document \
  --valid-data-path corpus/held_out_text_document --train-iters 500 --save gpt
exec "$here/slurm/study.sh" prose "$@"
