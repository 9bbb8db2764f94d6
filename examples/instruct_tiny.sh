#!/usr/bin/env bash
# Instruction tuning of the tiny chain.
#SBATCH --job-name=instruct-tiny
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
data="${DATA:-data}"
runs="${RUNS:-runs}"
choices=(
  --config "$here/tiny.toml"
  --retro-attention-gate 0
  --seq-length 512 --train-iters 4
  --instruction-data "$data"/instructions/*.jsonl
  --load "$runs/retro-tiny"
  --save "$runs/instruct-tiny"
)
exec "$here/slurm/launch.sh" finetune "${choices[@]}" "$@"
