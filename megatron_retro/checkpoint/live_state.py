"""The tensors of a run by name, as checkpoints know them: parameters, moments, random states.

`model.` and `optimizer.` names are those of the uncut model, whatever the layout. A random state belongs to one rank
(`random.00003.cpu`), so a run with more ranks finds none for the new ones and seeds them afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MODEL = "model."
OPTIMIZER = "optimizer."
RANDOM = "random."
MOMENTS = ("exp_avg", "exp_avg_sq")


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of this rank."""
    return {MODEL + name: value for name, value in module.state_dict(keep_vars=True).items() if value is not None}


def create_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make every trained parameter's moments now, as the first step would: zero."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in module.parameters():
        if parameter not in trained or optimizer.state.get(parameter):
            continue
        on_device = parameter.device.type == "cuda" and optimizer.defaults.get("fused", False)
        step_device = parameter.device if on_device else torch.device("cpu")
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device=step_device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        optimizer.state[parameter] = state


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts of this rank."""
    found = {}
    for name, parameter in module.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{OPTIMIZER}{name}.{entry}"] = value
    return found


def random_tensors(rank: int, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's random states under its number."""
    return {f"{RANDOM}{rank:05}.{device}": state for device, state in states.items()}


def vocabulary_rows(vocab_size: int) -> dict[str, int]:
    """The true rows of every parameter whose vocabulary may be padded."""
    return dict.fromkeys(("embedding.word.weight", "encoder.embedding.word.weight", "output.weight"), vocab_size)


def padded_rows(names: Iterable[str], parameters: Mapping[str, int]) -> dict[str, int]:
    """True rows of every tensor that follows a parameter with a padded vocabulary, its moments included."""
    found = {}
    for name in names:
        for parameter, rows in parameters.items():
            moments = [f"{OPTIMIZER}{parameter}.{moment}" for moment in MOMENTS]
            if name in (MODEL + parameter, *moments):
                found[name] = rows
    return found


def staging_copy(tensor: Tensor) -> Tensor:
    """Room on the CPU for a tensor's local part, pinned where a GPU copies into it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.device.type == "cuda")


def as_staged(tensor: Tensor, staged: Tensor) -> Tensor:
    """The staged local part with the layout of the live tensor."""
    if not isinstance(tensor, DTensor):
        return staged
    # `from_local` would bring it back to the mesh's device. The ignore: torch leaves this constructor untyped.
    return DTensor(staged, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]  # torch leaves it so
