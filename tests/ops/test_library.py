"""The compiled library: registration is complete, bad input is one sentence, choices are explained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.errors import ConfigError, EnvironmentProblem
from megatron_retro.ops import backends, library, registrations
from megatron_retro.ops.activation import SWIGLU, activate
from megatron_retro.testing.far_tensors import FAR, spread

ROOT = Path(__file__).parents[2]
COMPILED = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).requires_grad_()


def operator_inputs() -> Iterator[tuple[str, tuple[Any, ...]]]:
    table = torch.rand(1, 5, 4)
    rows = torch.rand(3)
    yield "gated_activation", (leaf(3, 20), leaf(20), 0, True)
    yield "gated_activation_backward", (torch.randn(3, 10), torch.randn(3, 20), None, 1, True)
    yield "residual_norm", (leaf(3, 20), leaf(3, 20), leaf(20), leaf(20), 1e-5, True, 0.0)
    yield "residual_norm", (leaf(3, 20), None, leaf(20), None, 1e-5, False, 1.0)
    statistics = (torch.rand(3), torch.rand(3))
    yield "residual_norm_backward", (
        torch.randn(3, 20), None, torch.randn(3, 20), *statistics, torch.randn(20), None, True, 0.0,
    )  # fmt: skip
    yield "rotary", (leaf(2, 5, 3, 8), table, table, False, False)
    yield "rotary_", (torch.randn(2, 5, 3, 8), table, table, True, False)
    yield "vocabulary_statistics", (torch.randn(3, 9), torch.tensor([0, 5, 20]), 0, rows, rows.clone(), rows.clone())
    yield "vocabulary_gradient_", (torch.randn(3, 9), torch.tensor([0, 5, 20]), 0, rows, rows.clone())
    yield "small_batch_gemv", (torch.randn(3, 20), torch.randn(7, 20), torch.randn(7))
    attention = (leaf(1, 8, 2, 8), leaf(1, 2, 3, 2, 8), leaf(1, 2, 3, 2, 8), torch.rand(1, 2, 3) > 0.3)
    tables = (torch.rand(8, 2), torch.rand(8, 2), torch.rand(3, 2), torch.rand(3, 2))
    yield "chunked_cross_attention", (*attention, 4, 0, 0.3, *tables, False)
    detached = tuple(each.detach() for each in attention)
    yield "chunked_cross_attention_backward", (
        torch.randn(1, 8, 2, 8), *detached, torch.randn(1, 8, 2, 8), torch.zeros(1, 2, 8), 4, 0, 0.3,
        None, None, None, None, False,
    )  # fmt: skip


@COMPILED
@pytest.mark.parametrize(("name", "inputs"), [pytest.param(*each, id=each[0]) for each in operator_inputs()])
def test_opcheck(name: str, inputs: tuple[Any, ...]) -> None:
    """Schema, fake, autograd registration and tracing, by torch's own checker."""
    torch.library.opcheck(getattr(torch.ops.megatron_retro, name).default, inputs)


@COMPILED
def test_opcheck_covers_every_operator() -> None:
    schema = (ROOT / "csrc" / "operators" / "schemas.cpp").read_text()
    assert {name for name, _ in operator_inputs()} == set(re.findall(r'"(\w+)\(', schema))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def attend(query: Tensor, key: Tensor, mask: Tensor | None = None, table: Tensor | None = None) -> tuple[Any, ...]:
    return "chunked_cross_attention", (query, key, key, mask, 4, 0, 1.0, table, None, None, None, False)


def normalize(residual: Tensor | None, weight: Tensor) -> tuple[Any, ...]:
    return "residual_norm", (ones(2, 4), residual, weight, None, 1e-5, True, 0.0)


def rotate(table: Tensor) -> tuple[Any, ...]:
    return "rotary", (ones(1, 3, 2, 8), table, table, False, False)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return "small_batch_gemv", (rows, weight, bias)


def activation(given: Tensor, bias: Tensor | None = None, kind: int = 0) -> tuple[Any, ...]:
    return "gated_activation", (given, bias, kind, True)


BAD_CALLS = {
    "input must be float32, bfloat16, float16 or float64": activation(ones(2, 4).int()),
    "a gated input must have an even last dimension, got 5": activation(ones(2, 5)),
    "kind must be 0": activation(ones(2, 4), kind=9),
    "bias must have 4 elements, got the shape [3]": activation(ones(2, 4), ones(3)),
    "bias must have the dtype of input": activation(ones(2, 4), ones(4).half()),
    "input must be contiguous": activation(ones(4, 6).T),
    "residual must have the shape of input: got [3, 4], expected [2, 4]": normalize(ones(3, 4), ones(4)),
    "weight must have 4 elements, got the shape [5]": normalize(None, ones(5)),
    "cosine rotates 10 dimensions of a head of 8": rotate(ones(1, 3, 5)),
    "cosine must have the sequences and positions of heads: got [1, 4, 2] for [1, 3, 2, 8]": rotate(ones(1, 4, 2)),
    "labels must be contiguous int64": ("vocabulary_statistics", (ones(2, 4), ones(2), 0, ones(2), ones(2), ones(2))),
    "the heads of query (3) must be a multiple of those of key (2)": attend(ones(1, 4, 3, 8), ones(1, 1, 2, 2, 8)),
    "mask must be [sequences, chunks, keys] of key: got [1, 1, 3] for [1, 1, 2, 2, 8]": attend(
        ones(1, 4, 2, 8), ones(1, 1, 2, 2, 8), mask=ones(1, 1, 3).bool()
    ),
    "weight must be contiguous [outputs, inputs]": product(ones(2, 4), ones(4, 3).T),
    "weight must have the dtype of input": product(ones(2, 4), ones(3, 4).bfloat16()),
    "input must be contiguous [rows, inputs]": product(ones(4, 2).T, ones(3, 4)),
    "input must have the 4 columns of weight, got the shape [2, 5]": product(ones(2, 5), ones(3, 4)),
    "bias must have 3 elements, got the shape [4]": product(ones(2, 4), ones(3, 4), ones(4)),
    "rotary tables come all four or not at all, got 1": attend(ones(1, 4, 2, 8), ones(1, 1, 2, 2, 8), table=ones(4, 2)),
}


@COMPILED
@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_bad_input_is_one_sentence(sentence: str) -> None:
    name, inputs = BAD_CALLS[sentence]
    with pytest.raises(RuntimeError) as problem:
        getattr(torch.ops.megatron_retro, name)(*inputs)
    message = str(problem.value)
    assert message.startswith(sentence) and "\n" not in message and "/" not in message


def spoiled(given: Tensor) -> dict[str, Tensor]:
    """What no operator takes in place of a tensor that it takes."""
    wider = torch.zeros((*given.shape[:-1], given.shape[-1] + 1), dtype=given.dtype)
    return {"dtype": given.detach().to(torch.int16), "shape": wider, "device": given.detach().to("meta")}


@COMPILED
@pytest.mark.parametrize(("name", "inputs"), [pytest.param(*each, id=each[0]) for each in operator_inputs()])
def test_every_argument_is_checked(name: str, inputs: tuple[Any, ...]) -> None:
    """Another dtype or shape, or memory elsewhere, in any one tensor: one sentence, never a wrong read."""
    operator = getattr(torch.ops.megatron_retro, name).default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    operator.redispatch(cpu, *inputs)
    for position, given in enumerate(inputs):
        if not isinstance(given, Tensor):
            continue
        for what, wrong in spoiled(given).items():
            if position == 0 and what != "dtype" and "backward" not in name:
                continue  # the first tensor of a forward pass says what the others must be like
            changed = (*inputs[:position], wrong, *inputs[position + 1 :])
            with pytest.raises(RuntimeError) as problem:
                operator.redispatch(cpu, *changed)
            message = str(problem.value)
            assert "\n" not in message and "/" not in message, (position, what)
            if what == "device":
                assert "must be on the device of" in message, position


@COMPILED
def test_index_arithmetic_beyond_32_bits() -> None:
    """Rows far apart in memory: element offsets beyond 2^31, without filling that much memory."""
    ops = torch.ops.megatron_retro
    values, table = torch.randn(1, 2, 1, 16).to(torch.bfloat16), torch.rand(1, 2, 8)
    far = ops.rotary(spread(values), table, table, False, False)
    assert torch.equal(far, ops.rotary(values, table, table, False, False))
    query, key = torch.randn(2, 9, 2, 16).to(torch.bfloat16), torch.randn(2, 2, 5, 2, 16).to(torch.bfloat16)
    settings = (4, 0, 0.25, None, None, None, None, False)
    results = []
    for given in ((query, key), (spread(query), spread(key))):
        attended, normalizer = ops.chunked_cross_attention(*given, given[1], None, *settings)
        backward = (query, *given, given[1], None, attended, normalizer, *settings)
        results.append((attended, normalizer, *ops.chunked_cross_attention_backward(*backward)))
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@COMPILED
@pytest.mark.full
@pytest.mark.parametrize("name", ["gated_activation", "residual_norm"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    """Whole tensors of 4.4 GB: the last rows come out as they do alone."""
    width = 64
    rows = FAR // width
    whole = torch.zeros(rows, width, dtype=torch.bfloat16)
    last = torch.randn(3, width).to(torch.bfloat16)
    whole[-3:] = last
    weight = torch.randn(width).to(torch.bfloat16)

    def run(given: Tensor) -> Tensor:
        if name == "gated_activation":
            return torch.ops.megatron_retro.gated_activation(given, None, 3, False)
        return torch.ops.megatron_retro.residual_norm(given, None, weight, None, 1e-5, False, 0.0)[0]

    assert torch.equal(run(whole)[-3:], run(last))


@COMPILED
def test_every_instruction_set_agrees() -> None:
    """The kernels that older processors would get, run in processes of their own; and two threads agree with one."""
    program = """
import torch
from megatron_retro.ops import library
assert library.problem() is None
torch.manual_seed(0)
ops, x, q, k = torch.ops.megatron_retro, torch.randn(700, 90), torch.randn(1, 9, 2, 24), torch.randn(1, 2, 5, 2, 24)
weight, bias = x[0].clone().requires_grad_(), x[1].clone().requires_grad_()
normed = ops.residual_norm(x, x, weight, bias, 1e-5, True, 0.0)[0]
gated = ops.gated_activation(x, bias, 1, True)
attended = ops.chunked_cross_attention(q, k, k, None, 4, 0, 0.2, None, None, None, None, False)[0]
gradients = torch.autograd.grad(normed.square().sum() + gated.square().sum(), (weight, bias))
products = [ops.small_batch_gemv(x[:rows].contiguous(), x, None) for rows in (1, 5, 19)]
products += [ops.small_batch_gemv(x[:rows].bfloat16(), x.bfloat16(), None) for rows in (1, 5)]
for values in (normed, attended, gated, *gradients, *products):
    print(values.double().square().sum().item())
"""
    results = []
    for name, threads in (("generic", "1"), ("avx2", "1"), ("", "2")):
        environment = {**os.environ, "MEGATRON_RETRO_INSTRUCTION_SET": name, "OMP_NUM_THREADS": threads}
        found = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        results.append([float(word) for word in found.stdout.split()])
    assert len(results[0]) == 10
    assert results[0] == pytest.approx(results[2], rel=1e-5) and results[1] == pytest.approx(results[2], rel=1e-5)


@COMPILED
@pytest.mark.skipif(not (shutil.which("nm") and (ROOT / "csrc").exists()), reason="needs nm and csrc")
def test_no_function_is_shared_between_instruction_sets() -> None:
    """A weak function of one set could be linked into another and stop an older processor."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        from build_operators import kernel_objects
    finally:
        sys.path.remove(str(ROOT / "csrc"))
    for path in kernel_objects():
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.search(r" [WVu] ", line) and "personality" not in line]
        assert [line for line in weak if not re.search(r"megatron_retro::(generic|avx2|avx512)::", line)] == []


def test_a_library_that_was_built_loads() -> None:
    """Everything else here is skipped without it, so a build that cannot be loaded must not look like no build."""
    if not library.PATH.exists():
        pytest.skip("csrc is not compiled")
    assert library.problem() is None


@COMPILED
def test_a_library_of_other_sources_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registrations.FAKES, "planted", lambda: None)  # type: ignore[arg-type]
    assert "is of other sources, it lacks planted" in str(library.problem.__wrapped__())


def test_a_wish_is_kept_or_refused_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "rotary=reference,gated_activation=auto")
    assert backends.choice("rotary", "cpu").backend == "reference"
    assert "asked for" in backends.choice("rotary", "cpu").reason
    assert dict(backends.backend_rows())["kernel rotary"].startswith("reference: ")
    for wrong in ("fast", "rotary=fast", "rotaries=native", "rotary=apex", "fp8_linear=native"):
        monkeypatch.setenv(backends.VARIABLE, wrong)
        with pytest.raises(ConfigError, match=backends.VARIABLE):
            backends.choice("rotary", "cpu")
    monkeypatch.setenv(backends.VARIABLE, "native")
    with pytest.raises(EnvironmentProblem, match="not for meta"):
        backends.choice("rotary", "meta")


def test_without_the_library_the_references_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package without csrc: every operator says why, and the model's faces work."""
    monkeypatch.setattr(library, "PATH", tmp_path / "_operators.so")
    assert "csrc is not compiled" in str(library.problem.__wrapped__())
    (tmp_path / "_operators.so").write_bytes(b"no library")
    assert "does not load" in str(library.problem.__wrapped__())
    monkeypatch.setattr(library, "problem", lambda: "csrc is not compiled")
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends._decided.cache_clear()
    try:
        assert backends.choice("rotary", "cpu").backend == "reference"
        kernels = {row: state for row, state in backends.backend_rows() if row.startswith("kernel ")}
        del kernels["kernel fp8_linear"]
        assert set(kernels.values()) == {"reference: no native kernel: csrc is not compiled"}
        assert activate(torch.ones(1, 2, 3), SWIGLU).shape == (1, 3)
        monkeypatch.setenv(backends.VARIABLE, "native")
        with pytest.raises(EnvironmentProblem, match="csrc is not compiled"):
            activate(torch.ones(1, 2, 3), SWIGLU)
    finally:
        backends._decided.cache_clear()


@COMPILED
def test_traced_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A face with a native kernel is one graph, without a break."""
    monkeypatch.setenv(backends.VARIABLE, "native")
    x = torch.randn(3, 2, 8)
    compiled = torch.compile(lambda t: activate(t, SWIGLU) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), activate(x, SWIGLU) * 2)
