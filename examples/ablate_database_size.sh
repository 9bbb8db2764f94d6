#!/usr/bin/env bash
# Does a larger database help? One table of 100 neighbours per chunk; 1, 1/2, 1/4 and 1/8 of the documents.
#SBATCH --job-name=database-size
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
if [ ! -e retrieval100/neighbors/train ]; then
  "$here/slurm/launch.sh" build-retrieval --config "$here/ablate_database_size.toml" \
    --retro-database-corpus corpus/train_text_document \
    --retro-query-corpus train=corpus/train_text_document held_out=corpus/held_out_text_document
fi
exec "$here/slurm/launch.sh" ablate --config "$here/ablate_database_size.toml" "$@"
