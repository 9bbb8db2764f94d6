#!/usr/bin/env bash
# What to run first on a machine with a GPU: one GPU, no network, ten minutes at most, one JSON file.
#   benchmarks/first_hour.sh [--cpu] [--only STEP ...] [--json FILE]
# Steps have time limits of their own and a failure stops none of the others; --cpu runs small forms of what a CPU can.
set -euo pipefail
cd "$(dirname "$0")/.."

# the project's environment, where tools/setup_environment.sh made one and no other is active
venv="${MEGATRON_RETRO_VENV:-$PWD/.venv}"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$venv/bin/activate" ]; then
  # shellcheck source=/dev/null
  source "$venv/bin/activate"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python benchmarks/first_hour/program.py "$@"
