"""The CUDA kernels are executed: on a GPU where there is one, always on the host shim under several thread orders."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops import library, registrations
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.ops.chunked_cross_attention import chunked_cross_attention
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, apply_rotary, rotary_table
from megatron_retro.testing.far_tensors import spread
from megatron_retro.testing.precision import excess_over_twice

ROOT = Path(__file__).parents[2]
CSRC = Path(os.environ.get("MEGATRON_RETRO_SHIM_CSRC", ROOT / "csrc"))  # or a copy with a planted fault
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None or not CSRC.exists(), reason="needs csrc and a C++ compiler")

SHIM, DEVICE = "shim", "device"
COUNTING = "MEGATRON_RETRO_SHIM_COUNTING"  # a folder: the shim is built there, and counts how often its lines run
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernels:
    """The operators and where their tensors live."""

    ops: Any
    device: str

    def excess(self, ours: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor | None) -> float:
        moved = [
            each if each is None else each.detach().to(self.device).requires_grad_(each.requires_grad)
            for each in inputs
        ]
        return max(excess_over_twice(ours, plain, moved), default=0.0)


@dataclass(frozen=True)
class Shim:
    """csrc/operators/cuda/*.cu for the host: the operators, and every kernel in the library by its place there."""

    ops: Any
    library: ctypes.CDLL
    compiled: Mapping[int, str]

    def launched(self) -> set[str]:
        """The kernels that have run in this process."""
        places = (ctypes.c_uint64 * 1000)()
        count = self.library.shim_launched(places, ctypes.c_uint64(len(places)))
        assert count <= len(places)
        return {self.compiled[place] for place in places[:count]}


def declared_kernels() -> set[str]:
    """The name after every `__global__` of the sources."""
    text = "".join(path.read_text() for path in sorted((CSRC / "operators").rglob("*.cu*")))
    found = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    assert len(found) == text.count("__global__")
    return set(found)


def compiled_kernels(library: Path) -> dict[int, str]:
    """Place and name, template arguments included, of every kernel that the compiler made."""
    listing = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    names = "|".join(sorted(declared_kernels()))
    place = r"^([0-9a-f]+) \w (?:void )?megatron_retro::device::\(anonymous namespace\)"
    pattern = rf"{place}::((?:{names})\b(?!.*lambda).*)$"
    return {int(place, 16): name for place, name in re.findall(pattern, listing, re.MULTILINE)}


@pytest.fixture(scope="session")
def shim() -> Shim:
    """Built once, kept while the sources stay as they are."""
    sys.path.insert(0, str(CSRC))
    try:
        from build_operators import build_shim
    finally:
        sys.path.remove(str(CSRC))
    folder = os.environ.get(COUNTING)
    target = Path(folder or CSRC.parent / "build" / "csrc") / f"_shim.{os.getpid()}.so"
    build_shim(target, counting=folder is not None)
    torch.ops.load_library(str(target))
    found = Shim(torch.ops.megatron_retro_shim, ctypes.CDLL(str(target)), compiled_kernels(target))
    target.unlink()
    registrations.register("megatron_retro_shim")
    return found


@pytest.fixture(params=[SHIM, DEVICE])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setenv(VARIABLE, "reference")
    torch.manual_seed(0)
    if request.param == SHIM:
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


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    for rows, width in ((3, 64), (2, 37), (5, 8), (1, 3000), (0, 8)):
        hidden, residual = leaf(rows, width, dtype=dtype, scale=2.0), leaf(rows, width, dtype=dtype)
        weight, bias = leaf(width, dtype=dtype), leaf(width, dtype=dtype)

        def layer(h: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return kernels.ops.residual_norm(h, r, w, b, 1e-5, True, 1.0)[:2]

        def plain_layer(h: Tensor, r: Tensor, w: Tensor, b: Tensor, n: int = width) -> tuple[Tensor, ...]:
            return functional.layer_norm(h + r, (n,), w + 1, b), h + r

        def rms(h: Tensor, w: Tensor) -> Tensor:
            return kernels.ops.residual_norm(h, None, w, None, 1e-5, False, 0.0)[0]

        def plain_rms(h: Tensor, w: Tensor, n: int = width) -> Tensor:
            return functional.rms_norm(h, (n,), w, 1e-5)

        assert kernels.excess(layer, plain_layer, hidden, residual, weight, bias) <= 0.0
        assert kernels.excess(rms, plain_rms, hidden, weight) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    plain = {
        0: functional.silu,
        1: functional.gelu,
        2: lambda x: functional.gelu(x, approximate="tanh"),
        3: lambda x: functional.relu(x).square(),
    }
    for rows, width in ((5, 64), (3, 19), (0, 8)):
        for kind, formula in plain.items():
            projected, bias = leaf(rows, 2 * width, dtype=dtype, scale=3.0), leaf(2 * width, dtype=dtype)

            def gated(x: Tensor, b: Tensor, f: Any = formula, n: int = width) -> Tensor:
                return f((x + b)[..., :n]) * (x + b)[..., n:]

            def ours(x: Tensor, b: Tensor, code: int = kind) -> Tensor:
                return kernels.ops.gated_activation(x, b, code, True)

            assert kernels.excess(ours, gated, projected, bias) <= 0.0
            alone = leaf(rows, width, dtype=dtype, scale=3.0)
            assert (
                kernels.excess(lambda x, k=kind: kernels.ops.gated_activation(x, None, k, False), formula, alone) <= 0.0
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(kernels: Kernels, thread_order: int, dtype: torch.dtype, interleaved: bool) -> None:
    for batch, length, heads, size, rotated in (
        (2, 3, 2, 32, 16), (1, 2, 3, 10, 6), (2, 2, 1, 16, 16), (1, 0, 2, 16, 8),
    ):  # fmt: skip
        table = rotary_table(torch.randint(0, 500, (batch, length)), RotaryFrequencies(rotated, 10000.0))
        wide = leaf(batch, length, heads, size + 16, dtype=dtype)

        def ours(x: Tensor, c: Tensor, s: Tensor, n: int = size) -> Tensor:
            return kernels.ops.rotary(x[..., :n], c, s, interleaved, False)

        def plain(x: Tensor, c: Tensor, s: Tensor, n: int = size) -> Tensor:
            return apply_rotary(x[..., :n], RotaryTable(c, s), interleaved=interleaved)

        assert kernels.excess(ours, plain, wide, table.cosine, table.sine) <= 0.0
        where = wide.detach()[..., :size].to(kernels.device, copy=True)
        cosine, sine = table.cosine.to(kernels.device), table.sine.to(kernels.device)
        expected = kernels.ops.rotary(where, cosine, sine, interleaved, False)
        kernels.ops.rotary_(where, cosine, sine, interleaved, False)
        assert torch.equal(where, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    def plain(s: Tensor, m: Tensor) -> Tensor:
        weights = (s * 0.5).masked_fill(~m, float("-inf")).softmax(-1)
        return weights.where(m.any(-1, keepdim=True), 0.0)

    for heads, width in ((3, 45), (1, 200), (0, 4)):
        scores = leaf(2, heads, 5, width, dtype=dtype, scale=4.0)
        mask = torch.rand(2, 1, 5, width) > 0.5
        mask[0, 0, 1] = False

        def ours(s: Tensor, m: Tensor) -> Tensor:
            return kernels.ops.masked_softmax(s, m.expand(s.shape).contiguous(), 0.5)

        assert kernels.excess(ours, plain, scores, mask) <= 0.0
        everything = torch.ones_like(mask)
        assert kernels.excess(lambda s, m: kernels.ops.masked_softmax(s, None, 0.5), plain, scores, everything) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 1100), (1, 256_000), (0, 8), (3, 1)])
def test_vocabulary_block(kernels: Kernels, thread_order: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Of a part of the vocabulary that begins at 100: labels inside, before and behind it."""
    rows, width = shape
    logits = (torch.randn(shape) * 5).to(dtype)
    labels = 100 + torch.tensor([7, width + 400, 0, width - 1])[:rows]
    scales = torch.rand(rows), torch.rand(rows)

    def ours(given: Tensor, where: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        largest, total, label_logit = (torch.zeros_like(scale[0]) for _ in range(3))
        kernels.ops.vocabulary_statistics(given, where, 100, largest, total, label_logit)
        normalizer = largest + total.log()
        slopes = given.clone()
        kernels.ops.vocabulary_gradient_(slopes, where, 100, normalizer, *scale)
        return normalizer, label_logit, slopes

    def plain(given: Tensor, where: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        compute = given if given.dtype == torch.float64 else given.float()
        held = ((where >= 100) & (where < 100 + width)).unsqueeze(-1)
        at = (where - 100).unsqueeze(-1).where(held, 0)
        normalizer = compute.logsumexp(-1)
        slopes = (compute - normalizer.unsqueeze(-1)).exp() * scale[0].unsqueeze(-1)
        slopes = slopes.scatter_add(-1, at, torch.where(held, -scale[1].unsqueeze(-1), 0.0))
        return normalizer, compute.gather(-1, at).where(held, 0.0).squeeze(-1), slopes.to(given.dtype)

    assert kernels.excess(ours, plain, logits, labels, *scales) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 11, 0, 4, 2, 16, 4, 6, 2),
        (1, 9, 6, 2, 2, 12, 4, 40, 4),
        (1, 120, 0, 1, 1, 8, 40, 11, 2),
        (1, 5, 0, 1, 1, 68, 2, 3, 2),
        (1, 5, 0, 1, 1, 72, 2, 3, 2),
        (1, 5, 0, 1, 1, 128, 2, 3, 2),
        (1, 5, 0, 1, 1, 132, 2, 3, 2),
        (1, 120, 1, 2, 1, 64, 40, 150, 2),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_chunked_cross_attention(
    kernels: Kernels, thread_order: int, dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool
) -> None:
    batch, length, first, heads, groups, size, chunk_length, keys, chunks = shape
    query, both = (
        leaf(batch, length, heads, size, dtype=dtype),
        leaf(batch, chunks, keys, groups, 2 * size, dtype=dtype),
    )
    mask = torch.rand(batch, chunks, keys) > 0.3
    mask[0, 0] = False
    mask[-1, -1, :2] = True  # one key alone has no gradient to compare
    mask[-1, -1, 64:128] = False  # whole tiles of keys between others
    frequencies = RotaryFrequencies(2 * (size // 4), 10000.0)
    tables = [rotary_table(torch.arange(count)[None], frequencies) for count in (length, keys)]
    turns = [turn[0].to(kernels.device) for table in tables for turn in (table.cosine, table.sine)]

    def ours(q: Tensor, kv: Tensor, m: Tensor) -> Tensor:
        return kernels.ops.chunked_cross_attention(
            q, kv[..., :size], kv[..., size:], m, chunk_length, first, size**-0.5, *turns, interleaved
        )[0]

    def plain(q: Tensor, kv: Tensor, m: Tensor) -> Tensor:
        moved = [RotaryTable(table.cosine.to(q.device), table.sine.to(q.device)) for table in tables]
        return chunked_cross_attention(
            q, kv[..., :size], kv[..., size:], m, chunk_length, first_position=first,
            query_table=moved[0], key_table=moved[1], interleaved=interleaved,
        )  # fmt: skip

    assert kernels.excess(ours, plain, query, both, mask) <= 0.0


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_over_heads_that_begin_anywhere(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    """Not at multiples of 16 bytes: not for the kernels on tensor cores, which copy as many at a time."""
    query, both = leaf(1, 7, 2, 17, dtype=dtype), leaf(1, 2, 5, 2, 33, dtype=dtype)

    def ours(q: Tensor, kv: Tensor) -> Tensor:
        heads = q[..., 1:], kv[..., 1:17], kv[..., 17:]
        return kernels.ops.chunked_cross_attention(*heads, None, 3, 0, 0.25, None, None, None, None, False)[0]

    def plain(q: Tensor, kv: Tensor) -> Tensor:
        return chunked_cross_attention(q[..., 1:], kv[..., 1:17], kv[..., 17:], None, 3)

    assert kernels.excess(ours, plain, query, both) <= 0.0


def test_index_arithmetic_beyond_32_bits(kernels: Kernels, thread_order: int) -> None:
    """Rows far apart give what rows side by side give."""
    ops, here = kernels.ops, {"device": kernels.device, "dtype": torch.bfloat16}
    heads, table = torch.randn(1, 2, 1, 16, **here), torch.rand(1, 2, 8, device=kernels.device)
    logits, labels = torch.randn(2, 40, **here), torch.tensor([3, 39], device=kernels.device)
    query, key = torch.randn(2, 9, 2, 16, **here), torch.randn(2, 2, 5, 2, 16, **here)
    settings = (4, 0, 0.25, None, None, None, None, False)
    results = []
    for place in (torch.clone, spread):
        given = [place(each) for each in (heads, logits, query, key)]
        rows = [torch.zeros(2, device=kernels.device) for _ in range(3)]
        ops.vocabulary_statistics(given[1], labels, 0, *rows)
        ops.vocabulary_gradient_(given[1], labels, 0, *rows)
        attended, normalizer = ops.chunked_cross_attention(given[2], given[3], key, None, *settings)
        attention = (query, given[2], given[3], key, None, attended, normalizer, *settings)
        gradients = ops.chunked_cross_attention_backward(*attention)
        turned = ops.rotary(given[0], table, table, False, False)
        results.append([turned, *rows, given[1], attended, normalizer, *gradients])
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "chunks", "keys"), [(0, 5, 2, 3), (1, 0, 2, 3), (1, 5, 0, 3), (1, 5, 2, 0)]
)
def test_nothing_to_attend_to_is_zero(
    kernels: Kernels, thread_order: int, dtype: torch.dtype, batch: int, length: int, chunks: int, keys: int
) -> None:
    query, key = leaf(batch, length, 2, 8, dtype=dtype), leaf(batch, chunks, keys, 1, 8, dtype=dtype)
    leaves = [each.detach().to(kernels.device).requires_grad_() for each in (query, key)]
    settings = (None, 2, 0, 0.5, None, None, None, None, False)
    attended = kernels.ops.chunked_cross_attention(leaves[0], leaves[1], leaves[1], *settings)[0]
    assert attended.shape == query.shape
    for each in (attended, *torch.autograd.grad(attended.sum(), leaves)):
        assert float(each.detach().abs().sum()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_neighbors_have_no_influence(kernels: Kernels, thread_order: int, dtype: torch.dtype) -> None:
    query, key = leaf(1, 8, 1, 8, dtype=dtype), leaf(1, 2, 6, 1, 8, dtype=dtype)
    mask = torch.tensor([[[True, True, False, True, False, False], [False] * 6]])
    poisoned = key.detach().clone()
    poisoned[~mask] = float("nan")
    results = []
    for source in (key.detach(), poisoned):
        leaves = [query.detach().to(kernels.device).requires_grad_(), source.to(kernels.device).requires_grad_()]
        out = kernels.ops.chunked_cross_attention(
            leaves[0], leaves[1], leaves[1], mask.to(kernels.device), 4, 0, 0.5, None, None, None, None, False
        )[0]
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert float(results[0][0][:, 7:].abs().max()) == 0.0 and float(results[0][0][:, :3].abs().max()) == 0.0


def parameters_of(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Every combination that pytest would run."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for chosen in itertools.product(*(mark.args[1] for mark in marks)):
        combination: dict[str, Any] = {}
        for mark, values in zip(marks, chosen, strict=True):
            names = mark.args[0]
            combination |= {names: values} if isinstance(names, str) else dict(zip(names, values, strict=True))
        yield combination


def test_every_kernel_in_every_type_is_run_by_a_test(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests above once more, in this process, with one order of threads: what none of them reaches fails here."""
    monkeypatch.setenv(VARIABLE, "reference")
    tests = [each for name, each in globals().items() if name.startswith("test_") and inspect.isfunction(each)]
    for test in tests:
        if "kernels" in inspect.signature(test).parameters:
            for parameters in parameters_of(test):
                torch.manual_seed(0)
                test(kernels=Kernels(shim.ops, "cpu"), thread_order=0, **parameters)
    assert {re.split(r"\W", name)[0] for name in shim.compiled.values()} == declared_kernels()
    assert set(shim.compiled.values()) - shim.launched() == set(), "compiled, and never executed"


def test_every_operator_has_a_cuda_side_or_is_declared_without(shim: Shim) -> None:
    operators = re.findall(r"library\.def\(\s*\"(\w+)\(", (CSRC / "operators" / "schemas.cpp").read_text())
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cuda = {name for name in operators if has_kernel(f"megatron_retro_shim::{name}", "CPU")}
    assert len(operators) >= 12 and set(operators) - on_cuda == library.CPU_ONLY


def is_template(mangled: str) -> bool:
    """Of our own files: kernels and what they call are templates, what launches them is not."""
    name = re.search(r"_GLOBAL__N_1(\d+)", mangled)
    return name is not None and mangled[name.end() + int(name[1]) :].startswith("I")


@pytest.mark.skipif(not COMPILER or "g++" not in COMPILER or not shutil.which("gcov"), reason="needs g++ and gcov")
def test_every_line_of_every_kernel_in_every_type_runs(tmp_path: Path) -> None:
    """A kernel that was launched may have found nothing to do: gcov counts lines, by instantiation."""
    test = f"{__file__}::{test_every_kernel_in_every_type_is_run_by_a_test.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(command, env={**environment, COUNTING: str(tmp_path)}, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout.decode()
    kernels, never = set(), []
    for counts in sorted(tmp_path.glob("*.gcda")):
        shown = subprocess.run(
            ["gcov", "--json-format", "--stdout", counts.name], cwd=tmp_path, capture_output=True, check=True
        )
        for source in json.loads(shown.stdout)["files"]:
            for line in source["lines"] if source["file"].endswith(".cu") else ():
                function = line.get("function_name", "")
                name = re.search(rf"\d({'|'.join(declared_kernels())})I", function)
                kernels |= {name[1]} if name else set()
                if line["count"] == 0 and is_template(function):
                    never.append((Path(source["file"]).name, line["line_number"], function))
    assert kernels == declared_kernels() and never == []


def test_every_barrier_is_missed(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """Each taken out of the sources in turn: a comparison above fails under one of the orders of threads."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    barriers = [
        (path, *match.span(1))
        for path in sorted((tmp_path / "csrc" / "operators" / "cuda").iterdir())
        for match in re.finditer(r"(__sync(?:threads|warp)\(\);)(?!.*on the shim it does)", path.read_text())
    ]
    assert len(barriers) >= 15
    random.Random(0).shuffle(barriers)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "shim and (norm or vocabulary or attention)",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["MEGATRON_RETRO_SHIM_CSRC"] = str(tmp_path / "csrc")
    for path, start, stop in barriers[: count(1, len(barriers))]:
        text = path.read_text()
        path.write_text(text[:start] + ";" + text[stop:])
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        path.write_text(text)
        where = f"{path.name} line {text[:start].count(chr(10)) + 1}"
        assert ran.returncode == 1 and "AssertionError" in ran.stdout, where + ran.stdout[-2000:]


PLANTED = """
#include <cstdio>
#include "cuda_shim.h"
__global__ void reversed(const float* from, float* to, bool with_barrier, bool stuck, bool unwritten) {
  float* shared = shim::running()->shared.data();
  if (!unwritten || threadIdx.x != 5) shared[threadIdx.x] = from[threadIdx.x];
  if (with_barrier) __syncthreads();
  if (stuck && threadIdx.x == 0) __syncthreads();
  if (stuck && threadIdx.x > 0 && threadIdx.x < 32) __syncwarp();
  to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
int main(int, char** words) {
  float from[64], to[64];
  const auto is = [&](int word) { return words[word][0] == '1'; };
  for (int i = 0; i < 64; ++i) from[i] = float(i);
  try {
    shim::launch(1, 64, 64 * 4, [&] { reversed(from, to, is(1), is(2), is(3)); });
  } catch (const std::exception& problem) {
    return std::puts(problem.what()), 3;
  }
  for (int i = 0; i < 64; ++i)
    if (!(to[i] == float(63 - i))) return 1;
  return 0;
}
"""


def test_the_shim_notices_a_missing_barrier_a_deadlock_and_memory_never_written(tmp_path: Path) -> None:
    source, program = tmp_path / "planted.cpp", tmp_path / "planted"
    source.write_text(PLANTED)
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-O1", "-w", f"-I{CSRC / 'shim'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)

    def exit_code(*words: str, seed: int = 0) -> int:
        environment = {"MEGATRON_RETRO_SHIM_SEED": str(seed)}
        return subprocess.run([program, *words], env=environment, capture_output=True, check=False).returncode

    assert [exit_code("1", "0", "0", seed=seed) for seed in range(4)] == [0] * 4
    assert any(exit_code("0", "0", "0", seed=seed) == 1 for seed in range(4))
    assert exit_code("1", "1", "0") == 3
    assert exit_code("1", "0", "1") == 1
