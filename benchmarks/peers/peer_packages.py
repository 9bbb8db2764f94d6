"""The peers that are no dependencies: installed apart, in the folder that MEGATRON_RETRO_PEERS names.

pip install --no-deps --target PEERS retro-pytorch==0.3.9 einops megatron-core==0.15.3
"""

from __future__ import annotations

import importlib.util
import os
import sys

VARIABLE = "MEGATRON_RETRO_PEERS"
MODULES = {"megatron-core": ("megatron",), "retro-pytorch": ("retro_pytorch", "einops")}


if os.environ.get(VARIABLE) is not None and os.environ[VARIABLE] not in sys.path:
    sys.path.append(os.environ[VARIABLE])  # behind everything else, and before anyone asks for versions


def is_here(peer: str) -> bool:
    """Whether a peer can be imported."""
    return all(importlib.util.find_spec(module) is not None for module in MODULES[peer])


def missing(peer: str) -> str | None:
    """Why a peer does not run, or None."""
    return None if is_here(peer) else f"{peer} is skipped: not installed, nor in the folder of {VARIABLE}"
