#!/usr/bin/env bash
# Perplexity of the tiny Retro, with and without neighbours.
#SBATCH --job-name=evaluate-tiny
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
runs="${RUNS:-runs}"
choices=(--load "$runs/retro-tiny" --eval-output "$runs/evaluate-tiny" --perplexity-windows 8)
exec "$here/slurm/launch.sh" evaluate perplexity "${choices[@]}" "$@"
