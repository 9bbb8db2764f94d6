"""Runs one step on a layout of ranks and compares it, gradient by gradient, with the plain model in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.microbatch import Microbatch, Neighbors
from megatron_retro.parallel.cuts import CUTS, Cut
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.runtime.seeds import generator
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.single_process import one_process

_TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "make_vocab_size_divisible_by": 8,
    "init_method_std": 0.1,
    "retro_add_retriever": True,
    "retro_chunk_length": 8,
    "retro_layers": (2, 4),
    "seq_length": 32,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "seed": 7,
}

LIKE_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "group_query_attention": True,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
}

LIKE_OLMO2: dict[str, Any] = {
    **LIKE_LLAMA,
    "norm_placement": "after",
    "qk_layernorm": True,
    "qk_norm_scope": "projection",
}

LIKE_GEMMA3: dict[str, Any] = {
    "normalization": "RMSNorm",
    "apply_layernorm_1p": True,
    "norm_placement": "both",
    "qk_layernorm": True,
    "geglu": True,
    "gelu_tanh": True,
    "disable_bias_linear": True,
    "scale_embedding": True,
    "sliding_window": 5,
    "full_attention_layers": (2,),
    "rotary_base_local": 50.0,
    "group_query_attention": True,
    "num_query_groups": 2,
}


def tiny_settings(**changes: Any) -> Settings:
    """A Retro of four layers that every layout up to 4 x 4 can cut."""
    sections = [
        ModelConfig(),
        RetroConfig(),
        ParallelConfig(),
        OptimizerConfig(),
        TrainingConfig(),
        DataConfig(),
        PeftConfig(),
    ]
    return Settings(sections).replace(**{**_TINY, **changes})


def random_batches(settings: Settings, *, neighbors: bool = True, absent: bool = True) -> list[Microbatch[Tensor]]:
    """The microbatches of one global batch: random tokens, some labels masked, some neighbours absent."""
    training, retro = settings[TrainingConfig], settings[RetroConfig]
    size, length = training.micro_batch_size, settings[DataConfig].seq_length
    vocabulary = settings[ModelConfig].vocab_size or 0
    chunks, retrieved = length // retro.retro_chunk_length, retro.retrieved_length()
    batches = []
    for number in range(training.global_batch_size // size):
        draw = generator(training.seed, "batch", number)
        tokens = torch.randint(vocabulary, (size, length + 1), generator=draw)
        found = torch.randint(vocabulary, (size, chunks, retro.retro_num_neighbors, retrieved), generator=draw)
        lengths = torch.randint(1, retrieved + 1, found.shape[:-1], generator=draw)
        if absent:
            lengths = lengths * (torch.rand(lengths.shape, generator=draw) > 0.25)
            lengths[:, number % chunks] = 0
        batches.append(
            Microbatch(
                tokens_BS=tokens[:, :-1],
                labels_BS=tokens[:, 1:],
                loss_mask_BS=torch.rand(size, length, generator=draw) > 0.2,
                neighbors=Neighbors(found, torch.arange(retrieved) < lengths[..., None]) if neighbors else None,
            )
        )
    return batches


@dataclass(frozen=True)
class StepOutcome:
    """What a step gives, on whatever layout."""

    loss: float
    squared_norm: float
    gradients: dict[str, Tensor]
    losses: list[Tensor]
    parameters: dict[str, Tensor]
    data_rank: int
    extra_losses: dict[str, float]


def whole(tensor: Tensor) -> Tensor:
    """The uncut tensor; every rank that holds a part calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every gradient, uncut, by name."""
    return {
        name: whole(parameter.grad).float().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def reference_outcome(settings: Settings, batches: Sequence[Microbatch[Tensor]], steps: int = 1) -> StepOutcome:
    """The plain model in one process."""
    return _outcome(one_process(settings, torch.device("cpu")), batches, steps)


def layout_outcome(
    settings: Settings, batches: Sequence[Microbatch[Tensor]], steps: int = 1, cuts: Sequence[Cut] = CUTS
) -> StepOutcome:
    """The same on this layout; every rank calls it, with the whole global batch."""
    mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
    trainable = ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length), cuts)
    share = len(batches) // trainable.data_size
    mine = batches[trainable.data_rank * share : (trainable.data_rank + 1) * share]
    return _outcome(trainable, [trainable.own_part(batch) for batch in mine], steps)


def _outcome(trainable: Any, batches: Sequence[Microbatch[Tensor]], steps: int) -> StepOutcome:
    """Parameters are those before the first step; gradients those of the last."""
    start = {name: whole(value.detach()).clone() for name, value in trainable.module.named_parameters()}
    trained = [parameter for parameter in trainable.module.parameters() if parameter.requires_grad]
    trained = trained or [torch.zeros(1, requires_grad=True)]  # a stage may be frozen as a whole
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    losses = trainable.evaluate(batches) or []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        result = trainable.train_step(batches, step=step + 500)
        if step < steps - 1:
            optimizer.step()
    norm = float(trainable.squared_gradient_norm())
    gradients = whole_gradients(trainable.module)
    return StepOutcome(result.loss, norm, gradients, losses, start, trainable.data_rank, result.extra_losses)


def run_layout(
    settings: Settings,
    world_size: int,
    batches: Sequence[Microbatch[Tensor]],
    steps: int = 1,
    cuts: Sequence[Cut] = CUTS,
) -> list[StepOutcome]:
    """The outcome on every rank."""
    return run_ranks(
        layout_outcome,
        world_size,
        settings,
        batches,
        steps,
        cuts,
        timeout=600.0 if settings[ParallelConfig].compile else 120.0,
    )


def worst_differences(reference: StepOutcome, outcomes: Sequence[StepOutcome]) -> dict[str, float]:
    """Largest error of loss, norm and each gradient over the ranks, relative to the largest entry of the reference.

    A gradient that a layout lost, or has too many, counts as infinite; so does a first value that is not the same.
    Gradients that are zero but for rounding (a bias of all keys alike, under a softmax) are measured by a hundredth of
    the model's largest gradient, which leaves an absolute bound of a ten-millionth of it.
    """
    found: dict[str, float] = {}
    least = 0.01 * max((float(gradient.abs().max()) for gradient in reference.gradients.values()), default=0.0)

    def note(name: str, error: float) -> None:
        found[name] = max(found.get(name, 0.0), error)

    for outcome in outcomes:
        note("loss", abs(outcome.loss - reference.loss) / abs(reference.loss))
        note("norm", abs(outcome.squared_norm - reference.squared_norm) / max(reference.squared_norm, 1e-30))
        for name in reference.extra_losses.keys() ^ outcome.extra_losses.keys():
            note(name, float("inf"))
        for name in reference.extra_losses.keys() & outcome.extra_losses.keys():
            expected = reference.extra_losses[name]  # near 0 all of it is rounding: the loss says what is much
            note(name, abs(outcome.extra_losses[name] - expected) / max(abs(expected), 0.01 * abs(reference.loss)))
        for name, gradient in outcome.gradients.items():
            note(name, _difference(reference.gradients.get(name), gradient, least))
        for name, value in outcome.parameters.items():
            note("first values", 0.0 if _difference(reference.parameters[name], value) == 0.0 else float("inf"))
        for number, losses in enumerate(outcome.losses, outcome.data_rank * len(outcome.losses)):
            note("evaluation", _difference(reference.losses[number], losses))
    for name in (*reference.gradients, "evaluation"):
        if not any(name in outcome.gradients or (name == "evaluation" and outcome.losses) for outcome in outcomes):
            note(name, float("inf"))
    return found


def _difference(expected: Tensor | None, got: Tensor, least: float = 1e-12) -> float:
    """Rows of padding, which layouts may have different numbers of, are left out."""
    if expected is None:
        return float("inf") if got.abs().max() > 0 else 0.0
    rows = min(expected.shape[0], got.shape[0])
    expected, got = expected[:rows], got[:rows]
    return float((expected - got).abs().max()) / max(float(expected.abs().max()), least)
