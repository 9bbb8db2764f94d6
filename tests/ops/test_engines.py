"""TransformerEngine and Apex behind our faces: the same numbers where they are, reasons where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops import backends, engines
from megatron_retro.ops.backends import APEX, NONE, REFERENCE, TRANSFORMER_ENGINE, VARIABLE
from megatron_retro.ops.linear import fp8_linear
from megatron_retro.ops.norm import layer_norm, residual_norm, rms_norm
from megatron_retro.ops.precision import values_and_gradients

ENGINES = {TRANSFORMER_ENGINE: engines.transformer_engine_problems, APEX: engines.apex_problems}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Choices are kept per process; what a test pretends must not stay."""
    kept = (backends._decided, engines._module_problems, engines._norm_module, engines._linear_module)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *, devices: bool, capability: tuple[int, int] = (9, 0)) -> None:
    """Both packages are installed, and this machine has a GPU or none."""
    monkeypatch.setattr(engines, "_module_problems", lambda name: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("engine", ENGINES)
def test_not_installed_is_a_reason(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert f"{engine} is not installed" in ENGINES[engine]("cuda")
    state = dict(backends.backend_rows())[f"kernels of {engine}"]
    assert state.startswith(f"cannot serve: {engine} is not installed; it serves on cuda, not on cpu")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_build_that_does_not_load_is_a_reason(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engines.importlib, "import_module", fail)
    reasons = ENGINES[engine]("cuda")
    assert f"{engine} does not load: libcudart.so.12: cannot open shared object file" in reasons


@pytest.mark.parametrize("engine", ENGINES)
def test_asked_for_by_name_it_is_refused_with_every_reason(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, devices=False)
    monkeypatch.setenv(VARIABLE, f"rms_norm={engine}")
    with pytest.raises(EnvironmentProblem, match="it serves on cuda, not on cpu"):
        rms_norm(torch.ones(2, 4), torch.ones(4), epsilon=1e-5)
    with pytest.raises(EnvironmentProblem, match="no CUDA device on this machine"):
        backends.backend_of("rms_norm", "cuda")
    pretend(monkeypatch, devices=True)
    assert backends.backend_of("rms_norm", "cuda") == engine
    assert "at hand" in dict(backends.backend_rows("cuda"))[f"kernels of {engine}"]


def test_fp8_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old GPU: `auto` serves nothing, says why, and only a wish by name brings the plain formula."""
    pretend(monkeypatch, devices=True, capability=(8, 0))
    found = backends.choice("fp8_linear", "cuda")
    assert (found.backend, found.reason) == (NONE, "FP8 needs compute capability 8.9, this GPU has 8.0")
    with pytest.raises(EnvironmentProblem, match=r"8\.9"):
        backends.backend_of("fp8_linear", "cuda")
    with pytest.raises(EnvironmentProblem, match=r"8\.9"):
        monkeypatch.setenv(VARIABLE, "fp8_linear=transformer_engine")
        backends.backend_of("fp8_linear", "cuda")
    monkeypatch.setenv(VARIABLE, "fp8_linear=reference")
    assert backends.backend_of("fp8_linear", "cuda") == REFERENCE


def test_what_the_engines_are_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented calls, played by a stand-in that computes with torch: weights are ours and get the gradients."""

    class Layer(torch.nn.LayerNorm):
        def __init__(self, width: int, eps: float, zero_centered_gamma: bool) -> None:
            super().__init__(width, eps)
            self.shift = float(zero_centered_gamma)

        def forward(self, hidden: Tensor) -> Tensor:
            scale = self.weight + self.shift
            return torch.nn.functional.layer_norm(hidden, self.normalized_shape, scale, self.bias, self.eps)

    apex = SimpleNamespace(
        fused_layer_norm_affine=lambda x, w, b, shape, eps: torch.nn.functional.layer_norm(x, shape, w, b, eps),
        fused_rms_norm_affine=lambda x, w, shape, eps: torch.nn.functional.rms_norm(x, shape, w, eps),
    )
    parts = {"transformer_engine.pytorch": SimpleNamespace(LayerNorm=Layer), engines._APEX: apex}
    monkeypatch.setattr(engines.importlib, "import_module", parts.__getitem__)
    hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((3, 16), (16,), (16,)))
    monkeypatch.setenv(VARIABLE, "reference")
    for form in (engines.transformer_engine_norm, engines.apex_norm):
        for plus_one in (False, True):
            theirs = partial(form, epsilon=1e-5, centered=True, weight_plus_one=plus_one)
            ours = partial(layer_norm, epsilon=1e-5, weight_plus_one=plus_one)
            inputs = (hidden, weight, bias)
            torch.testing.assert_close(values_and_gradients(theirs, inputs), values_and_gradients(ours, inputs))
    rms = engines.apex_norm(hidden, weight, None, 1e-5, False, False)
    torch.testing.assert_close(rms, rms_norm(hidden, weight, epsilon=1e-5))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_on_a_device(engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ENGINES[engine]("cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    width = 256
    hidden, residual = (torch.randn(64, width, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(width, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
    results = {}
    for name in (engine, REFERENCE):
        monkeypatch.setenv(VARIABLE, ",".join(f"{norm}={name}" for norm in backends._NORMS))
        results[name] = [
            *values_and_gradients(lambda h, w, b: layer_norm(h, w, b, epsilon=1e-5), (hidden, weight, bias)),
            *values_and_gradients(lambda h, w: rms_norm(h, w, epsilon=1e-5, weight_plus_one=True), (hidden, weight)),
            *values_and_gradients(
                lambda h, r, w, b: residual_norm(h, r, w, b, epsilon=1e-5, centered=True),
                (hidden, residual, weight, bias),
            ),
        ]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[engine], results[REFERENCE], rtol=tolerance, atol=64 * tolerance)


def test_fp8_of_transformer_engine_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = engines.transformer_engine_problems("cuda", fp8=True)
    if reasons:
        pytest.skip("; ".join(reasons))
    hidden = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(48, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    results = {}
    for name in (TRANSFORMER_ENGINE, REFERENCE):
        monkeypatch.setenv(VARIABLE, f"fp8_linear={name}")
        results[name] = values_and_gradients(fp8_linear, (hidden, weight))
    torch.testing.assert_close(results[TRANSFORMER_ENGINE], results[REFERENCE], rtol=0.05, atol=0.3)
