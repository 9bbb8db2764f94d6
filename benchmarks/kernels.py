"""Our kernels against eager PyTorch and torch.compile, forward and backward, on one thread of the CPU or on a GPU.

The small-batch GEMV has no backward; PyTorch's is the only other candidate, as in generation.

    [BENCHMARK_DEVICE=cuda] python benchmarks/kernels.py --json benchmarks/results/kernels.json [--quick]

Outputs and gradients of every candidate are compared with float64 first. Figures are CPU seconds of one thread
(medians, interleaved), on a GPU seconds by the clock until it is idle again.
Sizes are those of an 823M model cut to what a laptop trains: hidden size 1024, 2048 tokens; --quick is smaller and
leaves torch.compile out, as its compilation takes a minute. A GPU gets 8192 tokens and a hidden size of 2048.
"""

from __future__ import annotations

import os
import statistics

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MEGATRON_RETRO_KERNELS"] = "native"

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.activation import GELU, GELU_TANH, SQUARED_RELU, SWIGLU, activate
from megatron_retro.ops.chunked_cross_attention import chunked_cross_attention
from megatron_retro.ops.linear import MAX_GEMV_ROWS, linear
from megatron_retro.ops.linear_cross_entropy import linear_cross_entropy
from megatron_retro.ops.norm import layer_norm, residual_norm, rms_norm
from megatron_retro.ops.precision import in_float64
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, apply_rotary, rotary_table
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave, median_ratio

DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")
Formula = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """An operator, its plain form, and inputs; those of floating type that need it get gradients."""

    name: str
    ours: Formula
    plain: Formula
    inputs: tuple[Tensor | None, ...]
    target: float = 1.0


def with_gradients(formula: Formula, inputs: tuple[Tensor | None, ...]) -> Callable[[], list[Tensor]]:
    """Forward and backward with fixed output gradients; returns outputs and input gradients."""
    leaves = [each for each in inputs if each is not None and each.requires_grad]
    generator = torch.Generator().manual_seed(1)
    directions: list[Tensor] = []

    def run() -> list[Tensor]:
        outputs = formula(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not directions:
            directions.extend(
                torch.randn(each.shape, generator=generator, device="cpu").to(each)
                if each.dim() > 2
                else torch.ones_like(each)
                for each in outputs
            )
        gradients = torch.autograd.grad(outputs, leaves, directions) if leaves else ()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return [*(each.detach() for each in outputs), *gradients]

    return run


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random values that get a gradient."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def norm_cases(dtype: torch.dtype, tokens: int, width: int) -> Iterator[Case]:
    """Plain and with the residual add."""
    hidden, residual = (leaf(1, tokens, width, dtype=dtype) for _ in range(2))
    weight, bias = leaf(width, dtype=dtype), leaf(width, dtype=dtype)

    def plain_layer(h: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        summed = h + r
        return functional.layer_norm(summed, (width,), w, b), summed

    def plain_rms(h: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        summed = h + r
        return functional.rms_norm(summed, (width,), w, 1e-5), summed

    yield Case(
        "layer_norm",
        lambda h, w, b: layer_norm(h, w, b, epsilon=1e-5),
        lambda h, w, b: functional.layer_norm(h, (width,), w, b),
        (hidden, weight, bias),
    )
    yield Case(
        "rms_norm",
        lambda h, w: rms_norm(h, w, epsilon=1e-5),
        lambda h, w: functional.rms_norm(h, (width,), w, 1e-5),
        (hidden, weight),
    )
    yield Case(
        "residual_norm (LayerNorm)",
        lambda h, r, w, b: residual_norm(h, r, w, b, epsilon=1e-5, centered=True),
        plain_layer,
        (hidden, residual, weight, bias),
    )
    yield Case(
        "residual_norm (RMSNorm)",
        lambda h, r, w: residual_norm(h, r, w, None, epsilon=1e-5, centered=False),
        plain_rms,
        (hidden, residual, weight),
    )


def plain_rotary(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As models write it: rotate_half and two products."""
    rotated = 2 * cosine.shape[-1]
    rotated_part, passed = heads[..., :rotated], heads[..., rotated:]
    first, second = rotated_part.chunk(2, -1)
    cos = torch.cat((cosine, cosine), -1)[:, :, None].to(heads.dtype)
    sin = torch.cat((sine, sine), -1)[:, :, None].to(heads.dtype)
    return torch.cat((rotated_part * cos + torch.cat((-second, first), -1) * sin, passed), -1)


def pointwise_cases(dtype: torch.dtype, tokens: int, width: int) -> Iterator[Case]:
    """Rotary, activation, softmax under a mask."""
    heads = leaf(1, tokens, width // 64, 64, dtype=dtype)
    table = rotary_table(torch.arange(tokens)[None], RotaryFrequencies(32, 10000.0))
    yield Case(
        "rotary (half of a head)",
        lambda h, c, s: apply_rotary(h, RotaryTable(c, s)),
        plain_rotary,
        (heads, table.cosine, table.sine),
    )
    projected = leaf(1, tokens, 2, int(width * 8 / 3 / 64) * 64, dtype=dtype)
    yield Case(
        "gated_activation (SwiGLU)",
        lambda x: activate(x, SWIGLU),
        lambda x: functional.silu(x[..., 0, :]) * x[..., 1, :],
        (projected,),
    )
    plain_forms: dict[str, Formula] = {
        GELU: functional.gelu,
        GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
        SQUARED_RELU: lambda x: functional.relu(x).square(),
    }
    widened = leaf(1, tokens, 2 * width, dtype=dtype)
    for kind, formula in plain_forms.items():
        yield Case(kind, partial(activate, kind=kind), formula, (widened,))


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, qc: Tensor, qs: Tensor, kc: Tensor, ks: Tensor
) -> Tensor:
    """Pad the shifted queries to whole chunks, reshape, SDPA, shift back: the form of earlier code."""
    batch, length, heads, width = query.shape
    chunks = key.shape[1]
    size = length // chunks
    query, key = plain_rotary(query, qc, qs), plain_rotary(key.flatten(0, 1), kc, ks).view_as(key)
    shifted = functional.pad(query[:, size - 1 :], (0, 0, 0, 0, 0, size - 1)).reshape(
        batch * chunks, size, heads, width
    )
    attended = functional.scaled_dot_product_attention(
        shifted.transpose(1, 2),
        key.flatten(0, 1).transpose(1, 2),
        value.flatten(0, 1).transpose(1, 2),
        attn_mask=mask.flatten(0, 1)[:, None, None].expand(-1, heads, size, -1),
    )
    attended = attended.transpose(1, 2).reshape(batch, length, heads, width)
    return functional.pad(attended[:, : length - size + 1], (0, 0, 0, 0, size - 1, 0))


def attention_case(dtype: torch.dtype, tokens: int, width: int) -> Case:
    """k = 2 neighbours of r = 128 tokens for chunks of m = 64, some of them short, rotary inside."""
    heads, chunks = width // 64, tokens // 64
    query = leaf(1, tokens, heads, 64, dtype=dtype)
    key, value = (leaf(1, chunks, 256, heads, 64, dtype=dtype) for _ in range(2))
    lengths = torch.where(torch.rand(1, chunks, 2, 1) < 0.8, 128, torch.randint(1, 129, (1, chunks, 2, 1)))
    mask = (torch.arange(128) < lengths).flatten(2)
    frequencies = RotaryFrequencies(32, 10000.0)
    query_table = rotary_table((torch.arange(tokens)[None] + 1) % 64 + 63, frequencies)
    key_table = rotary_table(torch.arange(128).repeat(2)[None], frequencies)

    def ours(q: Tensor, k: Tensor, v: Tensor, m: Tensor, qc: Tensor, qs: Tensor, kc: Tensor, ks: Tensor) -> Tensor:
        tables = {"query_table": RotaryTable(qc, qs), "key_table": RotaryTable(kc, ks)}
        return chunked_cross_attention(q, k, v, m, 64, **tables)  # type: ignore[arg-type]

    tables = (query_table.cosine, query_table.sine, key_table.cosine, key_table.sine)
    return Case("chunked_cross_attention", ours, padded_attention, (query, key, value, mask, *tables), target=1.3)


def loss_case(dtype: torch.dtype, tokens: int, width: int, vocabulary: int) -> Case:
    """Output projection and loss."""
    hidden, weight = leaf(1, tokens, width, dtype=dtype), leaf(vocabulary, width, dtype=dtype, scale=0.05)
    labels = torch.randint(0, vocabulary, (1, tokens))

    def plain(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        logits = functional.linear(h, w)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits[0], targets[0], reduction="none")[None]

    return Case("linear_cross_entropy", linear_cross_entropy, plain, (hidden, weight, labels))


def gemv_case(dtype: torch.dtype, num_rows: int, width: int, num_matrices: int) -> Case:
    """Matrices one after the other, more than a cache holds, as a decoding step reads them."""
    rows = torch.randn(num_rows, width).to(dtype)
    weights = torch.randn(num_matrices, 4 * width, width).to(dtype)

    @torch.inference_mode()
    def ours(given: Tensor, matrices: Tensor) -> Tensor:
        return torch.stack([linear(given, each) for each in matrices])

    @torch.inference_mode()
    def plain(given: Tensor, matrices: Tensor) -> Tensor:
        return torch.stack([functional.linear(given, each) for each in matrices])

    return Case(f"small_batch_gemv (rows: {num_rows})", ours, plain, (rows, weights))


def check_equal(case: Case, runs: dict[str, Callable[[], list[Tensor]]]) -> None:
    """No candidate may be further from float64 than three times eager, or 32 roundings of the largest value."""
    exact = with_gradients(case.plain, tuple(in_float64(case.inputs)))()
    errors = {name: relative_errors(run(), exact) for name, run in runs.items()}
    for name, each in errors.items():
        for error, eager, value in zip(each, errors["eager"], runs["eager"](), strict=True):
            if not error <= max(3 * eager, 32 * torch.finfo(value.dtype).eps):
                raise SystemExit(f"{case.name}: {name} is {error:.2e} of the largest value off, eager {eager:.2e}")


def relative_errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Largest difference of each tensor over its largest value."""
    pairs = zip(got, exact, strict=True)
    return [float((left.double() - right).abs().max() / right.abs().max()) for left, right in pairs]


def measured(case: Case, dtype: torch.dtype, *, repeats: int, compiled: bool, exact: bool = True) -> Iterator[Figure]:
    """The speed-up over the best plain candidate, and each candidate's time."""
    formulas = {"ours": case.ours, "eager": case.plain}
    if compiled:
        torch._dynamo.reset()
        formulas["torch.compile"] = torch.compile(case.plain, dynamic=False)
    runs = {name: with_gradients(formula, case.inputs) for name, formula in formulas.items()}
    if exact:
        check_equal(case, runs)
    times = interleave(runs, repeats, warm_up=1)
    label = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    taken = {name: each.cpu if DEVICE == "cpu" else each.wall for name, each in times.items()}
    best = min((name for name in times if name != "ours"), key=lambda name: statistics.median(taken[name]))
    ratio = median_ratio(taken[best], taken["ours"])
    yield Figure(f"{label}: speed over {best}, the best of the others", ratio, "x", case.target)
    for name, each in taken.items():
        yield Figure(f"{label}: {name}", statistics.median(each) * 1e3, "ms", better=LOWER)


def peak_bytes(work: Callable[[], object]) -> int:
    """Resident memory that `work` needs beyond what the process holds before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def memory_figures(tokens: int, width: int, vocabulary: int) -> Iterator[Figure]:
    """Peak memory of the loss beyond its inputs and the gradients, ours over eager's."""
    case = loss_case(torch.float32, tokens, width, vocabulary)
    gradients = sum(each.numel() * 4 for each in case.inputs[:2] if each is not None)
    peaks = {
        name: peak_bytes(with_gradients(formula, case.inputs)) - gradients
        for name, formula in (("ours", case.ours), ("eager", case.plain))
    }
    for name, value in peaks.items():
        yield Figure(
            f"linear_cross_entropy at vocabulary {vocabulary}: peak, {name}", value / 2**20, "MiB", better=LOWER
        )
    share = peaks["ours"] / peaks["eager"]
    yield Figure(f"linear_cross_entropy at vocabulary {vocabulary}: peak over eager's", share, "", 0.1, LOWER)


def run(quick: bool) -> Iterator[Figure]:
    """Every operator, float32 and bfloat16."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole = (2048, 1024, 5) if DEVICE == "cpu" else (8192, 2048, 10)
    tokens, width, repeats = (512, 512, 5) if quick else whole
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device(DEVICE):
            cases = [*norm_cases(dtype, tokens, width), *pointwise_cases(dtype, tokens, width)]
            cases.append(attention_case(dtype, tokens // 2, width))
            # 256,000 logits of each token in float64 would not fit: equality is shown at 8,000
            check = loss_case(dtype, 64, width // 2, 8000)
            loss = loss_case(dtype, 256, width // 2, 8000 if quick else 256_000)
        for case in cases:
            yield from measured(case, dtype, repeats=repeats, compiled=not quick)
        for num_rows in (1, 2, 4, MAX_GEMV_ROWS[dtype]) if DEVICE == "cpu" else ():
            case = gemv_case(dtype, num_rows, width, 4 if quick else 12)
            yield from measured(case, dtype, repeats=2 * repeats, compiled=False)
        check_equal(
            check,
            {"ours": with_gradients(check.ours, check.inputs), "eager": with_gradients(check.plain, check.inputs)},
        )
        yield from measured(loss, dtype, repeats=3, compiled=False, exact=False)
    if DEVICE == "cpu":
        yield from memory_figures(tokens // 2, 64, 32_000 if quick else 256_000)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
