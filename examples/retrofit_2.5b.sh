#!/usr/bin/env bash
# Retro-fits the 2.25B GPT to a 2.5B Retro on 100B tokens. DATA: token files and neighbours; RUNS: where runs live.
#SBATCH --job-name=retro-2.5b
#SBATCH --nodes=8 --ntasks-per-node=8
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
  --config "$here/retrofit_2.5b.toml"
  --tokenizer-model "$data/tokenizer.model"
  --data-path "$data/tokens/corpus_text_document"
  --database-path "$data/retro/database"
  --neighbor-path "$data/retro/neighbors/corpus"
  --load "$runs/gpt-2.25b"
  --save "$runs/retro-2.5b"
)
exec "$here/slurm/launch.sh" retrofit "${choices[@]}" "$@"
