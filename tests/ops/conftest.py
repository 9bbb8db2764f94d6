"""The CUDA kernels as tests call them: on the host shim, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from megatron_retro.ops import library
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.testing.cuda_shim import Kernels, Shim, load_shim


@pytest.fixture(scope="session")
def shim() -> Shim:
    return load_shim()


@pytest.fixture(params=["shim", "device"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setenv(VARIABLE, "reference")
    torch.manual_seed(0)
    if request.param == "shim":
        return Kernels(request.getfixturevalue("shim").ops, "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if library.cuda_problem() is not None:
        pytest.skip(str(library.cuda_problem()))
    return Kernels(torch.ops.megatron_retro, "cuda")


@pytest.fixture(params=[0, 1, 2])
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The shim draws the order of threads and blocks from it."""
    monkeypatch.setenv("MEGATRON_RETRO_SHIM_SEED", str(request.param))
    return int(request.param)
