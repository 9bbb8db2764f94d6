#!/usr/bin/env bash
# Writes .ci/locks: every package that the set-up installs, for Python 3.10 to 3.13, with the hashes of its files.
# Needs uv. torch and what comes with it are left out: whether it is a build for CPUs or for CUDA, and from which index,
# is the machine's choice, so tools/setup_environment.sh installs it first, by .ci/constraints.txt alone.
set -euo pipefail
cd "$(dirname "$0")/.."

pins="$(mktemp)"
trap 'rm -f "$pins"' EXIT
# What the tests run with, Python 3.11, is pinned by hand; other Pythons get the newest that they can.
sed -n 's/#.*//; /==/p' .ci/constraints.txt | sed '/^torch==/!s/ *$/ ; python_version == "3.11"/' >"$pins"
mkdir -p .ci/locks
for extras in dev retrieval,serve; do
  flags=(--quiet --universal --python-version 3.10 --generate-hashes --no-header --no-annotate --constraint "$pins")
  for extra in ${extras//,/ }; do
    flags+=(--extra "$extra")
  done
  # The set-up builds csrc, so every lock holds what builds.
  printf 'setuptools>=77,<82\nwheel\npybind11>=2.13\n' |
    uv pip compile "${flags[@]}" pyproject.toml - |
    awk '/^[A-Za-z0-9]/ { kept = !/^(torch|triton|nvidia-|cuda-)/ } kept' >".ci/locks/$extras.txt"
done
