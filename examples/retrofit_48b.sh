#!/usr/bin/env bash
# Retro-fits the 43B GPT to a 48B Retro on 100B tokens, as published.
#   DATA, RUNS       token files and neighbours; where runs live
#   --dry-run        what it would cost, and what is wrong with it; --print-config: every setting
# All stages and sizes: examples/slurm/stage.sh, examples/slurm/submit.sh.
#SBATCH --job-name=retrofit-48b
#SBATCH --nodes=128 --ntasks-per-node=8 --gpus-per-node=8 --exclusive --mem=0 --time=2-00:00:00
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=B:USR1@300 --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/stage.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
exec "$here/slurm/stage.sh" retrofit 48b "$@"
