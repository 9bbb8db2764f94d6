"""Random numbers that are a function of (seed, purpose, place), and the states that a resumed run takes up.

Whoever draws random numbers asks for a generator of its own by name, so a draw added in one place moves no other.
"""

from __future__ import annotations

import hashlib
import os
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEED_BITS = 63


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose; the same on every machine and in every version of Python."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> (64 - SEED_BITS)


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for one purpose."""
    import torch

    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def use_deterministic_kernels() -> None:
    """Let torch use deterministic algorithms only; an operator without one raises."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def random_states() -> dict[str, torch.Tensor]:
    """The states of torch's global generators, as byte tensors."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Put torch's global generators where they were."""
    import torch

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
