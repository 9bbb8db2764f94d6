#!/usr/bin/env bash
# Text -> bytes -> index -> neighbour tables, small enough for any machine. STAGE: corpus, index.
#SBATCH --job-name=retrieval-data-tiny
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
data="${DATA:-data}"
corpus=(--input "$data"/text/*.jsonl --output-prefix "$data/tokens/corpus" --append-eod --resume --workers 1)
index=(
  --config "$here/tiny.toml"
  --retro-project-dir "$data/retro"
  --retro-database-corpus "$data/tokens/corpus_text_document"
  --retro-query-corpus "corpus=$data/tokens/corpus_text_document"
)
mkdir -p "$data/tokens"
case "${STAGE:-all}" in
  corpus) exec "$here/slurm/launch.sh" preprocess "${corpus[@]}" "$@" ;;
  index) exec "$here/slurm/launch.sh" build-retrieval "${index[@]}" "$@" ;;
  all)
    "$here/slurm/launch.sh" preprocess "${corpus[@]}" "$@"
    exec "$here/slurm/launch.sh" build-retrieval "${index[@]}" "$@"
    ;;
esac
