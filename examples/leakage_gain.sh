#!/usr/bin/env bash
# The gain of the Retros of findings.sh over their GPTs, by what neighbours share with the text. Trains nothing.
#SBATCH --job-name=leakage-gain
#SBATCH --nodes=1 --ntasks-per-node=1 --array=0-3
#SBATCH --requeue --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
exec "$here/slurm/study.sh" leakage_gain "$@"
