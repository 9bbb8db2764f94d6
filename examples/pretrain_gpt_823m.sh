#!/usr/bin/env bash
# Pretrains the 823M GPT on 1.1T tokens. DATA: token files; RUNS: where runs live.
#SBATCH --job-name=gpt-823m
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
exec "$here/slurm/stage.sh" pretrain_gpt 823m "$@"
