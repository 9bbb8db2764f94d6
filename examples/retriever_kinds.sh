#!/usr/bin/env bash
# A finished Retro reads the neighbours of hashed n-grams, of MiniLM (the `embed` extra), and of both re-ranked by BM25. Trains nothing.
#SBATCH --job-name=retriever-kinds
#SBATCH --nodes=1 --ntasks-per-node=1 --array=0-3
#SBATCH --requeue --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
exec "$here/slurm/study.sh" retriever_kinds "$@"
