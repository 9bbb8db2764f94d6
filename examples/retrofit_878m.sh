#!/usr/bin/env bash
# Retro-fits the 823M GPT to a 878M Retro on 100B tokens. DATA: token files and neighbours; RUNS: where runs live.
#SBATCH --job-name=retro-878m
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
exec "$here/slurm/stage.sh" retrofit 878m from 823m "$@"
