#!/usr/bin/env bash
# LoRA, adapters, P-tuning and (IA)3 on the GPT and on the Retro, each at several sizes. CONVERSATIONS and HELD_OUT are files of conversations.
#SBATCH --job-name=peft-study
#SBATCH --nodes=1 --ntasks-per-node=1 --array=0-3
#SBATCH --requeue --open-mode=append --output=%x-%A-%a.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
export PROCESSES=1 # one worker; its runs are processes of their own
cd "${DATA:-$here/../runs/quickstart}" # what examples/quickstart.sh made
for name in "${CONVERSATIONS:?set it to a file of conversations to train on}" "${HELD_OUT:?set it to a file of conversations to measure on}"; do
  if [ ! -f "$name" ]; then
    echo "error: there is no $name (looked for in $PWD)" >&2
    exit 2
  fi
done
exec "$here/slurm/launch.sh" ablate --config "$here/peft_study.toml" --instruction-data "$CONVERSATIONS" --instruction-valid-data "$HELD_OUT" "$@"
