"""Adam's state beside a model of Megatron's, by the names of the model's own tensors, or why it stays behind.

Core's `torch_dist` has it by parameter, cut and stacked as the weights are, or in buckets of one run's ranks, which
nothing names. A file of `mp_rank_XX` has lists: the parameters of each group in the order of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_retro.checkpoint.live_state import MOMENTS
from megatron_retro.checkpoint.training_state import TrainingState
from megatron_retro.convert.begun_run import BegunRun
from megatron_retro.convert.distributed_checkpoint import DistributedTensors, layer_names

MASTER = "fp32_param"  # what a model of 16 bits updates
KINDS = (*MOMENTS, MASTER)
_STATE = "optimizer.state."
_BUCKETS = ("optimizer.distributed.", "chained_0.optimizer.distributed.")
_SAVED_BY_PARAMETER = "load it there once and save it with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"
IN_BUCKETS = (
    f"it lies in buckets of one run's ranks: {_SAVED_BY_PARAMETER} (before core 0.14 --ckpt-fully-parallel-save)"
)
_MASTER_LISTS = ("fp32_from_fp16_params", "fp32_from_fp16")
_DERIVED = ("_extra_state", "inv_freq")


@dataclass(frozen=True)
class StoredAdam:
    """`tensors` has of each kind, by the name of its weight, what reads it; `content` is what lies beside them."""

    tensors: Mapping[str, Mapping[str, Callable[[], Tensor]]] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    def renamed(self, sources: Mapping[str, str]) -> StoredAdam:
        """The same by our names, of which `sources` are the stored ones; incomplete moments are none."""
        if self.problem:
            return self
        tensors = {
            kind: {ours: found[theirs] for ours, theirs in sources.items() if theirs in found}
            for kind, found in self.tensors.items()
        }
        for kind in MOMENTS:
            missing = [theirs for ours, theirs in sources.items() if ours not in tensors.get(kind, {})]
            if missing:
                return StoredAdam(problem=f"{kind} is missing of {len(missing)} tensors, {missing[0]} among them")
        return StoredAdam(tensors, self.content)


NONE = StoredAdam(problem="none is stored")


def distributed_adam(tensors: DistributedTensors, content: Mapping[str, Any], prefix: str) -> StoredAdam:
    """That of `torch_dist`, whose layers are stacked under `prefix`."""
    if any(name.startswith(_BUCKETS) for name in (*tensors.shapes, *tensors.others)):
        return StoredAdam(problem=IN_BUCKETS)
    if any(name.startswith("chained_") for name in tensors.shapes):
        return StoredAdam(problem="several optimizers share it")
    found = {}
    for kind in KINDS:
        begin = f"{_STATE}{kind}."
        shapes = {name.removeprefix(begin): shape for name, shape in tensors.shapes.items() if name.startswith(begin)}
        names = layer_names(shapes, prefix)
        found[kind] = {name: _reader(tensors, begin + stored, layer) for name, (stored, layer) in names.items()}
    return StoredAdam(found, content) if found[MOMENTS[0]] else NONE


def _reader(tensors: DistributedTensors, name: str, layer: int | None) -> Callable[[], Tensor]:
    return lambda: tensors.read(name, layer)


class _NotDerivable(Exception):
    """The lists of an optimizer that do not follow from its model."""


def listed_moments(
    file: Mapping[str, Any], parts: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[dict[str, dict[str, dict[str, Any]]], str]:
    """Of one rank's file: of each kind its model's parts, with state in place of weights; or why there is none.

    `parts` are the flattened parts of its model, in order.
    """
    if not isinstance(file.get("optimizer"), Mapping):
        return {}, NONE.problem
    try:
        return _by_kind(file["optimizer"], parts), ""
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        return {}, f"its lists are not those of Megatron's optimizers ({type(error).__name__}: {error})"
    except _NotDerivable as problem:
        return {}, str(problem)


def _by_kind(
    optimizer: Mapping[str, Any], parts: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    inner = optimizer.get("optimizer", optimizer)
    if not inner.get("state"):
        raise _NotDerivable(IN_BUCKETS)
    masters = next((optimizer[name] for name in _MASTER_LISTS if name in optimizer), None)
    owners: dict[bool, list[tuple[str, str, Tensor]]] = {True: [], False: []}
    for part, tensors in parts:
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and not name.endswith(_DERIVED):
                owners[tensor.ndim > 1 and not name.endswith(".bias")].append((part, name, tensor))
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {part: {} for part, _ in parts} for kind in KINDS}
    for number, group in enumerate(inner["param_groups"]):
        members = owners.pop(_decays(group), [])
        own = masters[number] if masters is not None else []
        if len(members) != len(group["params"]):
            raise _NotDerivable(f"group {number} has {len(group['params'])} parameters, not {len(members)}")
        for place, (index, (part, name, weight)) in enumerate(zip(group["params"], members, strict=True)):
            state = {kind: inner["state"][index][kind] for kind in MOMENTS}
            state |= {MASTER: own[place]} if len(own) == len(members) else {}
            for kind, tensor in state.items():
                if tensor.shape != weight.shape:
                    raise _NotDerivable(f"{kind} of {name} is {tuple(tensor.shape)}, not {tuple(weight.shape)}")
                found[kind][part][name] = tensor
    if any(owners.values()):
        raise _NotDerivable("it trains a part of the model")
    return found


def _decays(group: Mapping[str, Any]) -> bool:
    if group.get("lr_mult", 1.0) != 1.0 or group.get("is_decoupled_lr") or group.get("is_expert_parallel"):
        raise _NotDerivable("a group has a learning rate of its own, and its parameters have no names")
    return float(group.get("wd_mult", group.get("weight_decay"))) != 0.0


def progress_of(adam: StoredAdam, arguments: Mapping[str, Any]) -> BegunRun | str:
    """Where the run stood, or why it cannot be told. Its moments come as they are stored."""
    if adam.problem:
        return adam.problem
    kind = arguments.get("optimizer", "adam")
    if kind != "adam":
        return f"it is {kind}'s, and runs here have Adam's"
    steps = set(_steps(adam.content.get("optimizer")))
    if len(steps) != 1:
        return f"Adam's step is not told ({sorted(steps) or 'none'})"
    iteration = adam.content.get("iteration", arguments.get("iteration"))
    samples = arguments.get("consumed_train_samples")
    if not isinstance(iteration, int) or not isinstance(samples, int):
        return "the run's iteration or consumed_train_samples is not told"
    tokens = samples * int(arguments.get("seq_length") or 0)
    training = TrainingState(step=iteration, samples=samples, tokens=tokens)
    return BegunRun(training, steps.pop(), lambda name, moment: adam.tensors[moment][name](), _loss_scale(adam.content))


def _steps(tree: Any) -> Iterator[int]:
    """Every count of Adam's steps, which lies by parameter or by group."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in ("step", "common_step") and value is not None:
                yield int(value)
            elif name not in ("grad_scaler", "params"):
                yield from _steps(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _steps(value)


def _loss_scale(content: Mapping[str, Any]) -> Mapping[str, float]:
    scaler = content["optimizer"].get("grad_scaler") or {}
    return {"scale": float(scaler.get("scale", 1.0)), "good_steps": int(scaler.get("growth_tracker", 0))}
