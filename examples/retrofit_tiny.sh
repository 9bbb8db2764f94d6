#!/usr/bin/env bash
# The Retro of the tiny chain.
#SBATCH --job-name=retro-tiny
#SBATCH --nodes=2 --ntasks-per-node=1
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
  --config "$here/tiny.toml"
  --data-path "$data/tokens/corpus_text_document"
  --database-path "$data/retro/database"
  --neighbor-path "$data/retro/neighbors/corpus"
  --load "$runs/gpt-tiny"
  --save "$runs/retro-tiny"
)
exec "$here/slurm/launch.sh" retrofit "${choices[@]}" "$@"
