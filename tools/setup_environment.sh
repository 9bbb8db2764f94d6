# shellcheck shell=bash
# Sourced by tests/run.sh and examples/quickstart.sh: `setup_environment EXTRAS` leaves a Python on PATH that has
# megatron_retro with these extras, its compiled parts built. The second call finds all of it and returns at once.
#
# MEGATRON_RETRO_VENV         the virtual environment to use or create (an active one is respected; else .venv)
# MEGATRON_RETRO_TORCH_INDEX  a package index for torch itself, as one that holds CPU-only wheels
# MEGATRON_RETRO_TORCH        which torch, as "torch>=2.14"; else the one that the tests are pinned to, or the newest

setup_environment() {
  local extras="$1" root stamp wanted
  # pip leaves compiling to the first import. Where that may not write, every start would compile torch again.
  unset PYTHONDONTWRITEBYTECODE
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  _activate_environment "$root" || return
  stamp="$(python -c 'import sys; print(sys.prefix)')/megatron_retro.setup"
  wanted="$(_sources_digest "$root")"
  if [ -f "$stamp" ] && grep -qxE "$wanted ($extras|dev)" "$stamp"; then
    return 0
  fi
  echo "setting up megatron_retro[$extras] in $(dirname "$stamp") (once; takes a minute or two)"
  _install "$root" "$extras" || return
  echo "$wanted $extras" >>"$stamp"
}

_activate_environment() {
  local root="$1" folder
  folder="${MEGATRON_RETRO_VENV:-${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}}"
  if [ ! -x "$folder/bin/python" ]; then
    local python found=none
    if python="$(command -v python3)"; then
      found="$("$python" --version)"
    fi
    if [ "$found" = none ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "error: Python 3.10 or newer is needed; got: $found" >&2
      return 2
    fi
    echo "creating $folder"
    if ! "$python" -m venv "$folder"; then
      echo "error: cannot create a virtual environment in $folder" >&2
      echo "  fix: install Python's venv module (Debian: apt install python3-venv), or set MEGATRON_RETRO_VENV" >&2
      return 2
    fi
  fi
  export PATH="$folder/bin:$PATH"
}

_sources_digest() {
  (
    cd "$1" || exit
    find pyproject.toml setup.py .ci/constraints.txt .ci/locks csrc -type f \
      ! -path '*/__pycache__/*' ! -path '*/build/*' -print0 |
      sort -z | xargs -0 cat
  ) | sha256sum | cut -d' ' -f1
}

_install() {
  local root="$1" extras="$2" pins=() locked=()
  # Python compiles what it imports, once; pip would compile every module of every package: half of its time.
  local pip=(python -m pip install --quiet --disable-pip-version-check --no-compile)
  local lock="$root/.ci/locks/$extras.txt"
  if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    pins=(--constraint "$root/.ci/constraints.txt")
    if [ -n "${MEGATRON_RETRO_TORCH:-}" ]; then
      pins=(--constraint "$(python -c 'import sys; print(sys.prefix)')/constraints.txt")
      sed '/^torch==/d' "$root/.ci/constraints.txt" >"${pins[1]}"
    fi
  fi
  if ! python -c 'import torch' 2>/dev/null; then
    _install_torch "${pip[@]}" "${pins[@]}" || return
  fi
  # Without a GPU the kernels only wait for one: two architectures, and PTX for later ones, take half as long as all.
  if ! command -v nvidia-smi >/dev/null; then
    export MEGATRON_RETRO_CUDA_ARCHITECTURES="${MEGATRON_RETRO_CUDA_ARCHITECTURES:-80;90}"
  fi
  # Compilers work beside pip, which is one process; what they refuse is told below, when their objects are missing.
  python "$root/csrc/build_operators.py" >/dev/null 2>&1 &
  local compiling=$!
  echo "  packages"
  # Of Pythons that the lock knows, nothing is installed whose hash it does not hold, but torch, which is there by now.
  if [ -f "$lock" ] && python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    "${pip[@]}" --require-hashes --no-deps --requirement "$lock" || return
    locked=(--no-deps)
  else
    "${pip[@]}" "${pins[@]}" 'setuptools>=77,<82' wheel pybind11 || return  # torch 2.11 refuses later ones
  fi
  wait "$compiling" || true
  (cd "$root" && "${pip[@]}" "${pins[@]}" "${locked[@]}" --no-build-isolation --editable ".[$extras]") || return
}

_install_torch() {
  echo "  torch"
  if [ -n "${MEGATRON_RETRO_TORCH_INDEX:-}" ] && ! command -v nvidia-smi >/dev/null; then
    "$@" --index-url "$MEGATRON_RETRO_TORCH_INDEX" "${MEGATRON_RETRO_TORCH:-torch}"
  else
    command -v nvidia-smi >/dev/null ||
      echo "  (no NVIDIA driver: an index of CPU-only torch in MEGATRON_RETRO_TORCH_INDEX would spare gigabytes)"
    "$@" "${MEGATRON_RETRO_TORCH:-torch}"
  fi
}
