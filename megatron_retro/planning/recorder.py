"""Counts what tensors without memory go through: operations, bytes moved and sent, and what stays alive."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_retro.planning.fake_device import GPU

STAGE = "the rest of a stage"
_PARAMETERS = ("parameters", "trained_parameters", "largest_unit", "loose_parameters")
_ATTENTION_OF_A_CPU = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
WITHOUT_KERNEL = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh")
_READS_WHAT_IT_GIVES = ("embedding", "gather", "index", "index_select")
_CROSS_ATTENTION = "megatron_retro::chunked_cross_attention"
_ASYNCHRONOUS = ("async_op", "asyncOp")  # of a collective; torch has renamed it


@dataclass
class PartTrace:
    """One part of the model, for one microbatch on one rank."""

    parameters: int = 0
    trained_parameters: int = 0
    largest_unit: int = 0  # parameters of the largest unit of FSDP2 within the part
    loose_parameters: int = 0  # those in the unit of the stage itself
    forward_flops: float = 0.0
    backward_flops: float = 0.0  # with what is computed again
    moved_bytes: float = 0.0  # read and written by all that is no matrix product, forward and backward
    saved_bytes: float = 0.0  # held from the forward to the backward
    working_bytes: float = 0.0  # the most that the backward holds beside
    sent_bytes: float = 0.0  # to tensor ranks, forward and backward
    beside_bytes: float = 0.0  # of these, while a product runs that does not need them
    beside_flops: float = 0.0  # of such products
    context_bytes: float = 0.0  # to ranks that share sequences, forward and backward
    host_waits: int = 0  # values that the host reads of the device

    def __add__(self, other: PartTrace) -> PartTrace:
        """Both, one after the other."""
        most = ("largest_unit", "working_bytes")
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return PartTrace(**{name: max(pair) if name in most else sum(pair) for name, pair in pairs.items()})

    def only_parameters(self) -> PartTrace:
        """Of a part that is held and does not run."""
        return PartTrace(**{name: getattr(self, name) for name in _PARAMETERS})

    def times(self, number: float) -> PartTrace:
        """With so many times the samples in a microbatch; parameters stay."""
        factors = {each.name: 1 if each.name in _PARAMETERS else number for each in fields(self)}
        return PartTrace(**{name: getattr(self, name) * factor for name, factor in factors.items()})


@dataclass
class _UnderWay:
    """A collective that has begun and whose result nothing has read: where it comes to, and if a product ran since."""

    part: PartTrace
    sent_bytes: float
    place: tuple[int, int, int]
    storage: weakref.ref[torch.UntypedStorage]
    beside: bool = False


@dataclass
class _Held:
    """A storage that is alive: the part that made it, its size, and whether the backward made it."""

    part: str
    size: int
    fresh: bool
    reference: weakref.ref[torch.UntypedStorage]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts what runs, what is sent and what stays alive, for the part that runs; a storage counts once."""

    def __init__(self, given: Iterable[Tensor], context: ProcessGroup | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.parts: dict[str, PartTrace] = {}
        self.forward = True
        self.stack: list[str] = []
        self.turned_to = STAGE
        self._fresh = 0
        self._context = None if context is None else context.group_name
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._held: dict[int, _Held] = {}
        self._known: dict[Any, _Form | None] = {}
        self._under_way: list[_UnderWay] = []

    @property
    def running(self) -> str:
        """The innermost part whose forward runs, or else the one whose gradients are being computed."""
        return self.stack[-1] if self.stack else self.turned_to

    def part(self, name: str) -> PartTrace:
        """The counts of a part."""
        return self.parts.setdefault(name, PartTrace())

    def turn_to(self, name: str) -> None:
        """From here on gradients are those of this part."""
        self.turned_to = name

    def credit(self, tensor: Tensor, name: str) -> None:
        """Count a storage for another part than the one that made it."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        if held is not None:
            held.part = name

    def end_forward(self) -> None:
        """What is alive now is what the backward needs."""
        for held in self._held.values():
            self.part(held.part).saved_bytes += held.size
        self.forward = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            self.part(self.running).host_waits += 1
            return arguments[0].dtype == torch.bool or 1  # code that looks at values sees full masks
        if function is torch.ops.aten.nonzero.default:
            self.part(self.running).host_waits += 1
            return arguments[0].new_empty((arguments[0].numel(), arguments[0].dim()), dtype=torch.long)
        result = self._result(function, arguments, keywords)
        part = self.part(self.running)
        if function.namespace == "prim":
            return result
        if function.namespace == "c10d":
            self._send(function, arguments, part)
            return result
        flops = _flops(function, arguments, keywords, result)
        if self._under_way and not function.is_view:
            self._run_beside(arguments, flops, part)
        if self.forward:
            part.forward_flops += flops
        else:
            part.backward_flops += flops
        if not flops and not function.is_view:
            part.moved_bytes += _moved(function, (*arguments, *keywords.values()), result)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._hold(tensor, part)
        return result

    def _result(self, function: Any, arguments: Any, keywords: Any) -> Any:
        """New tensors are like the last ones that came of such arguments; layers repeat, and torch takes its time."""
        if function.is_view or function._schema.is_mutable or function.namespace == "c10d":
            return function(*arguments, **keywords)
        key = (function, _description(arguments), _description(list(keywords.items())))
        if key not in self._known:
            result = function(*arguments, **keywords)
            self._known[key] = _form(result)
            return result
        form = self._known[key]
        return function(*arguments, **keywords) if form is None else form.empty()

    def _hold(self, tensor: Tensor, part: PartTrace) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._held or address in self._given:
            return
        reference = weakref.ref(storage, lambda _: self._free(address))
        self._held[address] = _Held(self.running, size, not self.forward, reference)
        if not self.forward:
            self._fresh += size
            part.working_bytes = max(part.working_bytes, self._fresh)

    def _free(self, address: int) -> None:
        held = self._held.pop(address)
        self._fresh -= held.size if held.fresh else 0

    def _send(self, function: Any, arguments: Any, part: PartTrace) -> None:
        """Bytes that a rank sends in a ring: the whole once around, twice for a sum that all get."""
        group = next(ProcessGroup.unbox(each) for each in arguments if isinstance(each, torch.ScriptObject))
        sent = max(map(size, arguments[:2])) * (group.size() - 1) / group.size()
        sent *= 2 if function.__name__.startswith("allreduce") else 1
        if group.group_name == self._context:
            part.context_bytes += sent
            return
        part.sent_bytes += sent
        names = [argument.name for argument in function._schema.arguments]
        waits = [not given for name, given in zip(names, arguments, strict=False) if name in _ASYNCHRONOUS]
        if not any(waits):
            for tensor in _tensors(arguments[0]):
                self._under_way.append(_UnderWay(part, sent, _place(tensor), weakref.ref(tensor.untyped_storage())))

    def _run_beside(self, arguments: Any, flops: float, part: PartTrace) -> None:
        """An operator ends what it reads; a product stands beside all else that is under way."""
        read = [_place(tensor) for tensor in _tensors(arguments)]
        left = []
        for other in self._under_way:
            if other.storage() is None or any(_overlap(other.place, place) for place in read):
                other.part.beside_bytes += other.sent_bytes if other.beside else 0.0
            else:
                other.beside |= bool(flops)
                left.append(other)
        self._under_way = left
        part.beside_flops += flops if left else 0.0


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """The storage that a tensor lies in, and from where to where."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    first, extent = int(tensor.storage_offset()), 1 + sum((length - 1) * stride for length, stride in pairs)
    return tensor.untyped_storage()._cdata, first, first + extent


def _overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


def _tensors(argument: Any) -> Iterator[Tensor]:
    """All tensors of an argument."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from _tensors(each)


@dataclass(frozen=True)
class _Form:
    """What new tensors look like."""

    single: bool
    tensors: tuple[tuple[Any, Any, Any] | None, ...]

    def empty(self) -> Any:
        """Others that look so."""
        made = [
            None if tensor is None else torch.empty_strided(tensor[0], tensor[1], dtype=tensor[2], device=GPU)
            for tensor in self.tensors
        ]
        return made[0] if self.single else tuple(made)


def _form(result: Any) -> _Form | None:
    """None where there is more to a result than plain tensors without memory."""
    single = not isinstance(result, (tuple, list))
    results = (result,) if single else tuple(result)
    if not all(each is None or (type(each) is Tensor and each.device == GPU) for each in results):
        return None
    return _Form(single, tuple(None if each is None else (each.shape, each.stride(), each.dtype) for each in results))


def _description(argument: Any) -> Any:
    """What of an argument tells what comes out."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return tuple(map(_description, argument)) if isinstance(argument, (list, tuple)) else argument


def size(argument: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list; what is only repeated counts once."""
    if isinstance(argument, (list, tuple)):
        return sum(map(size, argument))
    if not isinstance(argument, Tensor):
        return 0
    lengths = (length for length, stride in zip(argument.shape, argument.stride(), strict=True) if stride)
    return math.prod(lengths) * argument.element_size()


def _flops(function: Any, arguments: Any, keywords: Any, result: Any) -> float:
    """Of a product or an attention; a causal one, whose last query sees every key, does half of a square less."""
    if function.name().startswith(_CROSS_ATTENTION):
        query, key = arguments[:2] if function.name() == _CROSS_ATTENTION else arguments[1:3]
        products = 4.0 * float(query.numel() * key.shape[2])
        return products * (1.0 if function.name() == _CROSS_ATTENTION else 2.5)
    packet = function._overloadpacket
    if packet.__name__ in _ATTENTION_OF_A_CPU:  # which torch's counter does not know
        packet = getattr(torch.ops.aten, packet.__name__.replace("_for_cpu", ""))
    formula = flop_registry.get(packet)
    if formula is None:
        return 0.0
    whole = float(formula(*arguments, **keywords, out_val=result))
    given = dict(zip([argument.name for argument in function._schema.arguments], arguments, strict=False))
    if not given.get("is_causal", False):
        return whole
    num_queries, num_keys = (int(given[name].shape[-2]) for name in ("query", "key"))
    return whole * (1 - num_queries / num_keys / 2)


def _moved(function: Any, arguments: Any, result: Any) -> float:
    """Bytes read and written."""
    if function.__name__.startswith(WITHOUT_KERNEL):
        return 0.0
    name = function._overloadpacket.__name__
    if name in _READS_WHAT_IT_GIVES:
        return 2.0 * size(result)
    if name in ("scatter_", "scatter_add_"):  # touches what the indices name
        return float(3 * arguments[2].numel() * result.element_size())
    given = {"out", "grad"} & set(function._overloadname.split("_"))  # among the arguments, and the result
    return float(size(arguments) + (0 if given else size(result)))
