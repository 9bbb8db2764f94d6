#!/usr/bin/env bash
# Instruction-tunes the 2.5B Retro with the encoder off. DATA: instruction files; RUNS: where runs live.
#SBATCH --job-name=instruct-2.5b
#SBATCH --nodes=1 --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
exec "$here/slurm/stage.sh" instruct 2.5b "$@"
