#!/usr/bin/env bash
# Does a larger database help? One table of 100 neighbours per chunk; 1, 1/2, 1/4 and 1/8 of the documents.
#SBATCH --job-name=database-size
#SBATCH --array=0-3 --ntasks=1
#SBATCH --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=B:USR1@300
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/ablate_database_size.toml" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
if [ -x "$here/../.venv/bin/python" ]; then
  export PATH="$here/../.venv/bin:$PATH"
fi
cd "${DATA:-$here/../runs/quickstart}" # what examples/quickstart.sh made
if [ ! -e retrieval100/neighbors/train ]; then
  megatron-retro build-retrieval --config "$here/ablate_database_size.toml" \
    --retro-database-corpus corpus/train_text_document \
    --retro-query-corpus train=corpus/train_text_document held_out=corpus/held_out_text_document
fi
exec megatron-retro ablate --config "$here/ablate_database_size.toml" "$@"
