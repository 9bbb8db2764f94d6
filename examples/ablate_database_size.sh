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
exec "$here/slurm/study.sh" ablate_database_size "$@"
