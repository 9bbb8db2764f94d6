"""What the model's own code keeps and sends: a few layers, cut as they would be, run without memory or peers.

Two plain and two retrieval layers with encoder, embedding and head stand for all: before the first retrieval layer a
frozen decoder keeps nothing. The numbers follow the code: an operator that keeps less for the backward, a cut that
sends less, or a weight that is frozen, changes them without a word here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.assembly.stage_building import freeze
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.layer_transforms import keeps
from megatron_retro.parallel.mesh import TENSOR
from megatron_retro.parallel.tensor_parallel import cut_model, cut_prompt
from megatron_retro.peft.attach import attach, connect
from megatron_retro.planning.fake_ranks import fake_rank, without_memory
from megatron_retro.planning.workload import Layout, Workload

EMBEDDING, LAYER, FIRST, AFTER, RETRIEVAL, ENCODER, HEAD = (
    "embedding",
    "layer",
    "first retrieval layer",
    "layer after the first retrieval layer",
    "retrieval layer",
    "encoder",
    "head",
)


@dataclass
class PartTrace:
    """One part of the model, for one microbatch on one tensor rank: what it saves for the backward when nothing is
    recomputed, what selective recomputation keeps, and what it sends to tensor ranks forward and backward."""

    saved_bytes: int = 0
    kept_bytes: int = 0
    sent_bytes: float = 0.0


@dataclass(frozen=True)
class Trace:
    """All parts; a rank's hidden state, and the encoded neighbours as retrieval layers read them (whole)."""

    parts: dict[str, PartTrace]
    hidden_bytes: int
    encoded_bytes: int

    def part(self, name: str) -> PartTrace:
        """What is traced of a part; nothing of one that does not run (the encoder behind a shut gate)."""
        return self.parts.get(name, PartTrace())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Attributes saved tensors and collectives to the innermost part that runs; a storage counts once."""

    def __init__(self, parameters: set[int], group_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: dict[str, PartTrace] = {}
        self.stack: list[str] = []
        self.last = HEAD
        self.seen = dict.fromkeys(parameters)
        self.kept: list[Tensor] = []
        self.ring = (group_size - 1) / group_size
        self.forward = True

    @property
    def part(self) -> PartTrace:
        """The innermost part that runs. Torch says at once that a part has ended whose input needs no gradient."""
        outside = HEAD if self.forward else self.last
        return self.parts.setdefault(self.stack[-1] if self.stack else outside, PartTrace())

    def save(self, tensor: Tensor) -> Tensor:
        """A saved-tensor hook."""
        plain = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = plain.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = None
            self.kept.append(plain)  # a freed storage's address would be taken by another one
            self.part.saved_bytes += storage.nbytes()
        return tensor

    def leave_out(self, tensor: Tensor) -> None:
        """A storage that is counted elsewhere."""
        self.kept.append(tensor)
        self.seen[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return arguments[0].dtype == torch.bool or 1  # code that looks at values sees full masks
        if function.namespace == "c10d":
            self.part.sent_bytes += self._sent(function.__name__, arguments)
        result = function(*arguments, **(keywords or {}))
        if self.forward and keeps(function.name()):
            self.part.kept_bytes += _size(result)
        return result

    def _sent(self, name: str, arguments: Any) -> float:
        """Bytes that a rank sends in a ring: the whole once around, twice for a sum that all get."""
        sizes = [_size(argument) for argument in arguments[:2]]
        return max(sizes) * self.ring * (2 if name.startswith("allreduce") else 1)


def _size(argument: Any) -> int:
    if isinstance(argument, (list, tuple)):
        return sum(map(_size, argument))
    return argument.numel() * argument.element_size() if isinstance(argument, Tensor) else 0


def trace_parts(work: Workload, layout: Layout) -> Trace:
    """Run forward and backward of the standing-in model on tensor rank 0."""
    retro = replace(work.retro, retro_layers=(2, 4) if work.retro.retro_add_retriever else None)
    parallel = ParallelConfig(tensor_model_parallel_size=layout.tensor, sequence_parallel=layout.sequence_parallel)
    value_type = torch.bfloat16 if work.value_bytes == 2 else torch.float32
    with fake_rank(0, layout.tensor, parallel) as mesh, without_memory(value_type):
        model = Retro(replace(work.model, num_layers=4), retro)
        if work.peft is not None:
            attach(model, work.peft)
        axis = TensorAxis(mesh.group(TENSOR), layout.sequence_parallel) if layout.tensor > 1 else None
        if axis is not None:
            cut_model(model, mesh.devices[TENSOR], axis)
            cut_prompt(model, axis)
        connect(model)
        freeze(model, work.trained)
        return _run(model, work, layout)


def _run(model: Retro, work: Workload, layout: Layout) -> Trace:
    tokens_BS = torch.zeros(layout.micro_batch, work.seq_length, dtype=torch.long)
    parameters = {local(parameter).untyped_storage()._cdata for parameter in model.parameters()}
    recorder = _Recorder(parameters, layout.tensor)
    passed: dict[str, int] = {}
    _watch(model, recorder, passed)
    with recorder:
        with torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda tensor: tensor):
            # without tensor ranks the loss looks at its labels' values, which are not there; its logits do instead
            labels_BS = tokens_BS if layout.tensor > 1 else None
            losses_BS = model(tokens_BS, _neighbors(work, layout), labels_BS=labels_BS)
        recorder.forward = False
        losses_BS.sum().backward()
    return Trace(recorder.parts, passed[LAYER], passed.get(ENCODER, 0))


def _neighbors(work: Workload, layout: Layout) -> Neighbors[Tensor] | None:
    retro = work.retro
    if not retro.retro_add_retriever:
        return None
    chunks = work.seq_length // retro.retro_chunk_length
    shape = (layout.micro_batch, chunks, retro.retro_num_neighbors, retro.retrieved_length())
    return Neighbors(torch.zeros(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.bool))


def _watch(model: Retro, recorder: _Recorder, passed: dict[str, int]) -> None:
    """Tell the recorder which part runs, forward and backward."""
    for name, module in _parts(model):
        module.register_forward_pre_hook(partial(_enter, recorder, name))
        module.register_forward_hook(partial(_leave, recorder, passed, name))
        module.register_full_backward_pre_hook(partial(_enter, recorder, name))
        module.register_full_backward_hook(partial(_leave_backward, recorder))


def _parts(model: Retro) -> Iterator[tuple[str, nn.Module]]:
    assert model.embedding is not None and model.output is not None
    yield EMBEDDING, model.embedding
    yield from zip((LAYER, FIRST, AFTER, RETRIEVAL), model.layers.values(), strict=True)
    if model.encoder is not None:
        yield ENCODER, model.encoder
    yield HEAD, model.output


def _enter(recorder: _Recorder, name: str, module: nn.Module, arguments: Any) -> None:
    recorder.stack.append(name)
    recorder.last = name


def _leave(
    recorder: _Recorder, passed: dict[str, int], name: str, module: nn.Module, arguments: Any, output: Any
) -> None:
    recorder.stack.pop()
    first = output[0] if isinstance(output, tuple) else output
    passed[name] = _size(first)
    if name == ENCODER:  # counted once for a whole stage, not for the layer that happens to save it first
        recorder.leave_out(first)


def _leave_backward(recorder: _Recorder, module: nn.Module, inner: Any, outer: Any) -> None:
    if recorder.stack:
        recorder.stack.pop()
