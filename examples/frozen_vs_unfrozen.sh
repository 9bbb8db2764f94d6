#!/usr/bin/env bash
# Retro-fitting with the decoder frozen, or with everything trained.
#SBATCH --job-name=frozen-unfrozen
#SBATCH --nodes=1 --ntasks-per-node=1 --array=0-3
#SBATCH --requeue --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
exec "$here/slurm/study.sh" frozen_vs_unfrozen "$@"
