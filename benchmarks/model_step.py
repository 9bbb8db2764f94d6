"""Training steps of GPT and Retro on one CPU thread, beside the packages' models and the bound of matrix products.

d 512, 8 layers, sequence 1024, m 64, k 2, r 128, vocabulary 20,000, cross-attention in layer 6 and in the encoder's
first layer, no biases, forward and backward; every model has the same sizes (54.6 to 54.9M parameters). The bound is
the time of every matrix product of the step (linear layers, and the two products of each attention, half of them where
it is causal), forward and backward, by `torch.mm` and `torch.bmm` alone. Peers that are not installed are skipped by
name (see `benchmarks/peers/peer_packages.py`).

In bfloat16 all are measured again, in a second run. A CPU without AVX-512 has no instructions for it, and torch's
products are up to 80 times slower: there the second run has d 256, sequence 512 and vocabulary 4,000.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.costs import model_costs
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, Times, benchmark_main, interleave, median_ratio

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import peer_packages
import retro_models

SIZES = {
    "vocabulary": 20000,
    "length": 1024,
    "width": 512,
    "layers": 8,
    "retrieval_layer": 6,
    "heads": 8,
    "chunk": 64,
    "neighbors": 2,
    "retrieved": 128,
}
SMALLER = {**SIZES, "vocabulary": 4000, "length": 512, "width": 256, "heads": 4}
QUICK = {**SIZES, "vocabulary": 2000, "length": 256, "width": 128, "heads": 2}
CORE = "megatron-core"
PEERS = {"retro-pytorch": retro_models.retro_pytorch, CORE: retro_models.megatron_core}
Step = Callable[[], float]


def model_config(sizes: dict[str, int]) -> ModelConfig:
    """The shape that all models share; learned positions, as megatron-core's Retro takes them."""
    return ModelConfig(
        num_layers=sizes["layers"],
        hidden_size=sizes["width"],
        num_attention_heads=sizes["heads"],
        vocab_size=sizes["vocabulary"],
        make_vocab_size_divisible_by=1,
        max_position_embeddings=sizes["length"],
        position_embedding_type="learned_absolute",
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )


def retro_config(sizes: dict[str, int], gate: float = 1.0) -> RetroConfig:
    """Our neighbour positions (rotary) included."""
    return RetroConfig(
        retro_add_retriever=True,
        retro_chunk_length=sizes["chunk"],
        retro_num_neighbors=sizes["neighbors"],
        retro_num_retrieved_chunks=sizes["retrieved"] // sizes["chunk"],
        retro_layers=(sizes["retrieval_layer"],),
        retro_attention_gate=gate,
    )


def inputs(sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Tokens with one label more, and neighbours."""
    generator = torch.Generator().manual_seed(0)
    chunks = sizes["length"] // sizes["chunk"]
    neighbor_shape = (1, chunks, sizes["neighbors"], sizes["retrieved"])
    tokens = torch.randint(1, sizes["vocabulary"], (1, sizes["length"] + 1), generator=generator)
    return tokens, torch.randint(1, sizes["vocabulary"], neighbor_shape, generator=generator)


def ours(sizes: dict[str, int], retro: RetroConfig, dtype: torch.dtype = torch.float32) -> tuple[Retro, Step]:
    """A model of ours and its training step."""
    config = model_config(sizes)
    model = Retro(config, retro)
    initialize(model, config, retro, seed=0)
    model = model.to(dtype)
    tokens, neighbor_tokens = inputs(sizes)
    neighbors = None
    if retro.retro_add_retriever:
        neighbors = Neighbors(neighbor_tokens, torch.ones_like(neighbor_tokens, dtype=torch.bool))
    step = retro_models.training_step(model, lambda: model(tokens[:, :-1], neighbors, labels_BS=tokens[:, 1:]).mean())
    return model, step


def matrix_products(sizes: dict[str, int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(rows, inputs, outputs) of every linear layer; (batch, queries, head size, keys) of every attention."""
    width, heads, tokens = sizes["width"], sizes["heads"], sizes["length"]
    chunks, near, far = tokens // sizes["chunk"], sizes["neighbors"], sizes["retrieved"]
    read, size = chunks * near * far, width // heads

    def layer(rows: int) -> list[tuple[int, ...]]:
        return [(rows, width, 3 * width), (rows, width, width), (rows, width, 4 * width), (rows, 4 * width, width)]

    linear = layer(tokens) * sizes["layers"] + layer(read) * 2
    linear += [(read, width, width), (tokens, width, 2 * width), (read, width, width)]
    linear += [(tokens, width, width), (read, width, 2 * width), (tokens, width, width)]
    linear += [(tokens, width, sizes["vocabulary"])]
    attention = [(heads, tokens, size, tokens)] * sizes["layers"] + [(chunks * near * heads, far, size, far)] * 2
    attention += [
        (chunks * heads, near * far, size, sizes["chunk"]),
        (chunks * heads, sizes["chunk"], size, near * far),
    ]
    return linear, attention


def bound_step(sizes: dict[str, int]) -> Step:
    """Every matrix product of a training step, nothing else. Operands exist before."""
    linear, attention = matrix_products(sizes)
    tensors = {shape: _operands(shape) for shape in {*linear, *attention}}

    def step() -> float:
        for shape in linear:
            rows, weight, gradient = tensors[shape]
            rows @ weight.T, gradient @ weight, gradient.T @ rows
        for number, shape in enumerate(attention):
            if shape[1] == shape[3] == sizes["length"] and number % 2:
                continue  # causal: half of the square, that is every second layer's
            query, key, weights = tensors[shape]
            for _ in range(2):
                query @ key.mT, weights @ key, weights.mT @ query
        return 0.0

    return step


def _operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    if len(shape) == 3:
        rows, inner, columns = shape
        return torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(rows, columns)
    batch, queries, inner, keys = shape
    return torch.randn(batch, queries, inner), torch.randn(batch, keys, inner), torch.randn(batch, queries, keys)


def check_outputs(sizes: dict[str, int]) -> None:
    """What is timed computes: a shut gate is the GPT bit for bit, first losses are those of a uniform guess."""
    shut, gpt = ours(sizes, retro_config(sizes, gate=0.0)), ours(sizes, RetroConfig())
    losses = {"shut": shut[1](), "gpt": gpt[1](), "retro": ours(sizes, retro_config(sizes))[1]()}
    if losses["shut"] != losses["gpt"]:
        raise AssertionError(f"a shut gate is not the GPT: {losses}")
    guess = math.log(sizes["vocabulary"])
    if any(abs(loss - guess) > 0.5 for loss in losses.values()):
        raise AssertionError(f"first losses are not near {guess}: {losses}")


def peer(name: str, sizes: dict[str, int]) -> Step:
    """A peer's step, if it has our size."""
    model, step = PEERS[name](sizes, *inputs(sizes))
    size, mine = (sum(p.numel() for p in m.parameters()) for m in (model, ours(sizes, retro_config(sizes))[0]))
    if abs(size / mine - 1) > 0.02 and sizes is SIZES:
        raise AssertionError(f"{name} has {size} parameters, ours {mine}")
    return step


def candidates(sizes: dict[str, int]) -> dict[str, Step]:
    """Everything that is timed in float32, by name."""
    found = {
        "bound": bound_step(sizes),
        "retro": ours(sizes, retro_config(sizes))[1],
        "gpt": ours(sizes, RetroConfig())[1],
        "gate 0": ours(sizes, retro_config(sizes, gate=0.0))[1],
    }
    found |= {name: peer(name, sizes) for name in PEERS if peer_packages.is_here(name)}
    if peer_packages.is_here(CORE):
        found[f"{CORE} gpt"] = retro_models.megatron_core_gpt(sizes, inputs(sizes)[0])[1]
    return found


def half_candidates(sizes: dict[str, int]) -> dict[str, Step]:
    """What is timed in bfloat16, and the Retro peers in float32 beside it."""
    half = torch.bfloat16
    found = {
        "retro bf16": ours(sizes, retro_config(sizes), half)[1],
        "gpt bf16": ours(sizes, RetroConfig(), half)[1],
        **{f"{name} beside bf16": peer(name, sizes) for name in PEERS if peer_packages.is_here(name)},
    }
    if peer_packages.is_here(CORE):
        found[f"{CORE} bf16"] = retro_models.megatron_core(sizes, *inputs(sizes), half)[1]
        found[f"{CORE} gpt bf16"] = retro_models.megatron_core_gpt(sizes, inputs(sizes)[0], half)[1]
    return found


def print_peak(name: str, quick: bool) -> None:
    """Peak memory of model and step above what the process had before, in MB; the entry of a child process.

    A small step comes first, so that code which is loaded at its first use does not count.
    """
    torch.set_num_threads(1)
    small = {**QUICK, "width": 64, "heads": 1}

    def built(sizes: dict[str, int]) -> Step:
        return PEERS[name](sizes, *inputs(sizes))[1] if name in PEERS else ours(sizes, retro_config(sizes))[1]

    built(small)()
    before = resident_megabytes()
    built(QUICK if quick else SIZES)()
    print(resident_megabytes("VmHWM") - before)


def resident_megabytes(field: str = "VmRSS") -> float:
    """Memory of this process: now, or its peak (VmHWM; getrusage's would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def peak_megabytes(name: str, quick: bool) -> float:
    """The peak of one step in a fresh process."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import model_step; "
    code += f"model_step.print_peak({name!r}, {quick})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def rates(sizes: dict[str, int], times: dict[str, Times]) -> list[Figure]:
    """Tokens per CPU-second of each candidate."""
    length = sizes["length"]
    return [Figure(f"{name}: tokens per CPU-second", length / found.median_cpu, "1/s") for name, found in times.items()]


def speedup(times: dict[str, Times], name: str, over: str) -> float:
    """The median over rounds of paired ratios of CPU-seconds."""
    return median_ratio(times[over].cpu, times[name].cpu)


def figures(sizes: dict[str, int], times: dict[str, Times]) -> list[Figure]:
    """Our step in float32 beside the bound, our GPT, and the peers."""
    config = model_config(sizes)
    counted = [
        model_costs(config, retro, sizes["length"]).training_flops() for retro in (retro_config(sizes), RetroConfig())
    ]
    over_gpt = speedup(times, "gpt", "retro") / (counted[0] / counted[1])
    result = [
        *rates(sizes, times),
        Figure("retro, share of the matrix-product bound", speedup(times, "retro", "bound"), "", 0.95),
        Figure("retro over GPT: time ratio / ratio of counted FLOPs", over_gpt, "", 1.05, LOWER),
        Figure("gate 0 over GPT: time", speedup(times, "gpt", "gate 0"), "", 1.01, LOWER),
    ]
    if "retro-pytorch" in times:
        result.append(Figure("speed over retro-pytorch", speedup(times, "retro", "retro-pytorch"), "x", 1.40))
        bound = speedup(times, "bound", "retro-pytorch")
        result.append(Figure("the matrix-product bound over retro-pytorch", bound, "x"))
    if CORE in times:
        result.append(Figure(f"speed over {CORE}", speedup(times, "retro", CORE), "x", 1.2))
        result.append(Figure(f"GPT: speed over {CORE}", speedup(times, "gpt", f"{CORE} gpt"), "x"))
    return result


def half_figures(sizes: dict[str, int], times: dict[str, Times]) -> list[Figure]:
    """Our step in bfloat16 beside core's in bfloat16, and the faster peer's in float32."""
    result = rates(sizes, times)
    peers = [name for name in times if name.endswith("beside bf16")]
    if peers:
        best = min(peers, key=lambda name: times[name].median_cpu)
        ratio = speedup(times, "retro bf16", best)
        result.append(Figure("bf16 over the faster peer in fp32", ratio, "x", 2.0 if sizes is SIZES else None))
    if f"{CORE} bf16" in times:
        result.append(Figure(f"bf16: speed over {CORE}", speedup(times, "retro bf16", f"{CORE} bf16"), "x", 1.3))
        result.append(Figure(f"bf16, GPT: speed over {CORE}", speedup(times, "gpt bf16", f"{CORE} gpt bf16"), "x"))
    return result


def peak_figures(quick: bool) -> list[Figure]:
    """Memory of a step of ours and of core's."""
    peaks = {name: peak_megabytes(name, quick) for name in ("ours", CORE)}
    ratio = peaks["ours"] / peaks[CORE]
    return [
        *(Figure(f"{name}: peak memory of a step", value, "MB") for name, value in peaks.items()),
        Figure(f"peak memory over {CORE}'s", ratio, "", 0.65, LOWER),
    ]


def run(quick: bool) -> Iterator[Figure]:
    """One thread, candidates in turn."""
    torch.set_num_threads(1)
    sizes = QUICK if quick else SIZES
    for reason in filter(None, map(peer_packages.missing, PEERS)):
        say(reason)
    check_outputs(sizes)
    yield from figures(sizes, interleave(candidates(sizes), rounds=5, warm_up=1))
    half = sizes if quick or torch.backends.cpu.get_cpu_capability() == "AVX512" else SMALLER
    yield from half_figures(half, interleave(half_candidates(half), rounds=3, warm_up=1))
    if peer_packages.is_here(CORE):
        yield from peak_figures(quick)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
