#!/usr/bin/env bash
# GPT and Retro of five sizes, three methods, six sets: 540 runs, each on the eight GPUs of one node, shared by the array's nodes.
# DATA (default: here) holds runs/ (what the recipes of pretraining and retro-fitting saved) and data/peft/SET.{train,valid}.jsonl.
#SBATCH --job-name=peft-study-published
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --array=0-15
#SBATCH --requeue --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
export DATA="${DATA:-.}"
exec "$here/slurm/study.sh" peft_study_published "$@"
