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
exec "$here/slurm/stage.sh" retrofit 2.5b from 2.25b "$@"
