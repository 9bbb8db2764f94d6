#!/usr/bin/env bash
# A gate that opens for a share of the chunks, against one that is always open.
#SBATCH --job-name=adaptive-gate
#SBATCH --array=0-3 --ntasks=1
#SBATCH --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=B:USR1@300
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/adaptive_gate.toml" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
if [ -x "$here/../.venv/bin/python" ]; then
  export PATH="$here/../.venv/bin:$PATH"
fi
cd "${DATA:-$here/../runs/quickstart}" # what examples/quickstart.sh made
exec megatron-retro ablate --config "$here/adaptive_gate.toml" "$@"
