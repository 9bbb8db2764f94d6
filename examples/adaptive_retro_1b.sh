#!/usr/bin/env bash
# Trains a 1.2B Retro whose gate decides per chunk whether to read. DATA: token files and neighbours; RUNS: where runs live.
#SBATCH --job-name=adaptive-1b
#SBATCH --nodes=4 --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
data="${DATA:-data}"
runs="${RUNS:-runs}"
choices=(
  --config "$here/adaptive_retro_1b.toml"
  --vocab-file "$data/gpt2-vocab.json"
  --merge-file "$data/gpt2-merges.txt"
  --data-path "$data/tokens/corpus_text_document"
  --database-path "$data/retro/database"
  --neighbor-path "$data/retro/neighbors/corpus"
  --save "$runs/adaptive-1b"
)
exec "$here/slurm/launch.sh" pretrain "${choices[@]}" "$@"
