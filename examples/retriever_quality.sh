#!/usr/bin/env bash
# A finished Retro with a smaller database, other orders of neighbours, and neighbours replaced at random. Trains nothing.
#SBATCH --job-name=retriever
#SBATCH --nodes=1 --ntasks-per-node=1 --array=0-3
#SBATCH --requeue --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
export PROCESSES=1 # one worker; its runs are processes of their own
cd "${DATA:-$here/../runs/quickstart}" # what examples/quickstart.sh made
build() { # directory of the project, flags
  if [ ! -e "$1/neighbors/held_out" ]; then
    "$here/slurm/launch.sh" build-retrieval --retro-project-dir "$@" --retro-chunk-length 32 \
      --retro-index-str IVF256,Flat --retro-tasks train encode merge query \
      --tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/tokenizer.model \
      --retro-database-corpus corpus/train_text_document --retro-query-corpus held_out=corpus/held_out_text_document
  fi
}
build retrieval100 --retro-query-num-neighbors-save 100
build retrieval-overlap --retro-rerank overlap
build retrieval-bm25 --retro-rerank bm25
exec "$here/slurm/launch.sh" ablate --config "$here/retriever_quality.toml" "$@"
