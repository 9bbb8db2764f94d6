#!/usr/bin/env bash
# Sets up what is missing and runs every check. Flags:
#   --full         the long counts, results to tests/results/
#   --setup-only   stop after the set-up
#   --cuda-build   with a torch that is built with CUDA, in .venv-cuda (several GB, no GPU needed): what such a torch shows
#   anything else goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tools/setup_environment.sh
source tools/setup_environment.sh

arguments=()
setup_only=false
whole=true
for word in "$@"; do
  case "$word" in
    --setup-only) setup_only=true ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' tests/run.sh; exit ;;
    --full) arguments+=(--full) ;;
    --cuda-build)
      export MEGATRON_RETRO_VENV="$PWD/.venv-cuda" MEGATRON_RETRO_TORCH="torch>=2.14"
      arguments+=(-m cuda_build)
      whole=false
      ;;
    *) arguments+=("$word"); whole=false ;;
  esac
done

# Tests ask nvcc for one architecture and PTX: each further one takes a minute and a half of a core.
if ! command -v nvidia-smi >/dev/null; then
  export MEGATRON_RETRO_CUDA_ARCHITECTURES="${MEGATRON_RETRO_CUDA_ARCHITECTURES:-90}"
fi
setup_environment dev
if "$setup_only"; then
  exit 0
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tests fork their ranks, which a process that has met a GPU cannot; benchmarks/first_hour.sh runs a GPU's tests.
export CUDA_VISIBLE_DEVICES=
how=(-q -rs --numprocesses "${MEGATRON_RETRO_TEST_PROCESSES:-2}" --dist worksteal "${arguments[@]}")
if ! "$whole"; then
  exec python -m pytest "${how[@]}"
fi
# The quickstart runs beside the tests, which wait for one another half of the time.
seen="$(mktemp -d)"
setsid ./examples/quickstart.sh --output "$seen/quickstart" >"$seen/quickstart.log" 2>&1 &
quickstart=$!
trap 'kill -- "-$quickstart" 2>/dev/null || true' EXIT
echo "== the quickstart begins, beside the tests: $seen/quickstart.log"
code=0
# The quickstart is one process and goes first: it must not be what is left at the end.
nice -n 5 python -m pytest "${how[@]}" || code=$?
wait "$quickstart" || code=$?
echo "== the quickstart"
cat "$seen/quickstart.log"
exit "$code"
