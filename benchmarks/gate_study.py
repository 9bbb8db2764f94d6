"""Does the adaptive gate open where neighbours help and shut where they do not, and what does a bare penalty do?

Synthetic text of random tokens, where the last token of every chunk says what its neighbour is: the next chunk itself
(useful: it can be copied) or noise. Three gates are trained on the same batches: under our budget (divergence of the
mean rate from a target), under a bare penalty on the rate (weight x mean rate, as Adaptive-RETRO-GPT-1B was trained),
and under none. Beside each: the mean rate at useful and at useless chunks, and the loss of useful chunks' tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.gates import AdaptiveGate
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main

CHUNK, CHUNKS, VOCABULARY = 8, 8, 34
USEFUL, NOISE = 0, 1
WEIGHT = 0.3
BUDGETS = ("target rate", "bare penalty", "none")


@dataclass(frozen=True)
class Sample:
    """Tokens, neighbours, and which chunks have a useful one."""

    tokens: Tensor
    neighbors: Neighbors
    useful: Tensor


def sample(batch: int, generator: torch.Generator) -> Sample:
    """Random text, half of the neighbours useful."""
    shape = (batch, CHUNKS + 1, CHUNK)
    chunks = torch.randint(2, VOCABULARY, shape, generator=generator)
    useful = torch.rand(batch, CHUNKS + 1, generator=generator) < 0.5
    chunks[:, :, -1] = torch.where(useful, USEFUL, NOISE)
    noise = torch.randint(2, VOCABULARY, (batch, CHUNKS, CHUNK), generator=generator)
    found = torch.where(useful[:, :-1, None], chunks[:, 1:], noise)
    neighbors = Neighbors(found[:, :, None], torch.ones_like(found, dtype=torch.bool)[:, :, None])
    # the label of the last position is the first token of the chunk after the last
    return Sample(chunks.flatten(1)[:, : CHUNKS * CHUNK + 1], neighbors, useful[:, :-1])


def build(seed: int) -> tuple[Retro, AdaptiveGate]:
    """A small Retro with one adaptive gate, half open at first."""
    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=VOCABULARY)
    retro = RetroConfig(
        retro_add_retriever=True,
        retro_chunk_length=CHUNK,
        retro_num_neighbors=1,
        retro_num_retrieved_chunks=1,
        retro_layers=(2,),
        retro_encoder_layers=1,
        retro_gate_type="adaptive",
        retro_gate_target_rate=0.5,
    )
    built = Retro(model, retro)
    initialize(built, model, retro, seed)
    gate = next(part for part in built.modules() if isinstance(part, AdaptiveGate))
    return built, gate


def train(budget: str, steps: int, seed: int) -> dict[str, float]:
    """Train and measure on fresh samples."""
    model, gate = build(seed)
    gate.budget_scale = WEIGHT if budget == "target rate" else 0.0
    rates: list[Tensor] = []
    gate.register_forward_hook(lambda module, arguments, output: rates.append(output))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rates.clear()
        batch = sample(16, generator)
        loss = model(batch.tokens[:, :-1], batch.neighbors, labels_BS=batch.tokens[:, 1:]).mean()
        if budget == "bare penalty":
            loss = loss + WEIGHT * rates[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return measure(model, gate)


@torch.no_grad()
def measure(model: Retro, gate: AdaptiveGate) -> dict[str, float]:
    """Rates and losses, useful and useless chunks apart."""
    model.eval()
    batch = sample(256, torch.Generator().manual_seed(99))
    losses = model(batch.tokens[:, :-1], batch.neighbors, labels_BS=batch.tokens[:, 1:])
    assert gate.last_rates is not None
    # the attending chunk of u predicts the tokens of chunk u + 1; its flag at the end cannot be known without reading
    attending = losses[:, CHUNK - 1 : -1].unflatten(1, (CHUNKS - 1, CHUNK))[..., :-1].mean(-1)
    useful = batch.useful[:, : CHUNKS - 1]
    return {
        "rate where neighbours help": gate.last_rates[batch.useful].mean().item(),
        "rate where they are noise": gate.last_rates[~batch.useful].mean().item(),
        "loss where neighbours help": attending[useful].mean().item(),
    }


def run(quick: bool) -> list[Figure]:
    """Means over seeds."""
    torch.set_num_threads(1)
    steps, seeds = (300, 1) if quick else (400, 2)
    figures = []
    for budget in BUDGETS:
        found = [train(budget, steps, seed) for seed in range(seeds)]
        for name in found[0]:
            value = sum(result[name] for result in found) / seeds
            figures.append(_figure(budget, name, value))
    return figures


def _figure(budget: str, name: str, value: float) -> Figure:
    targets = {"rate where neighbours help": (0.8, "higher"), "rate where they are noise": (0.2, LOWER)}
    unit = "nats" if "loss" in name else ""
    if budget != "target rate" or name not in targets:
        return Figure(f"{budget}: {name}", value, unit)
    return Figure(f"{budget}: {name}", value, unit, *targets[name])


if __name__ == "__main__":
    benchmark_main(__doc__, run)
