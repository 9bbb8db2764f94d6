#!/usr/bin/env bash
# Retro-fits the 8.5B GPT to a 9.5B Retro on 100B tokens. DATA: token files and neighbours; RUNS: where runs live.
#SBATCH --job-name=retro-9.5b
#SBATCH --nodes=16 --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
exec "$here/slurm/stage.sh" retrofit 9.5b from 8.5b "$@"
