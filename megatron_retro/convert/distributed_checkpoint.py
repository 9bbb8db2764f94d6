"""Tensors of torch's distributed checkpoints (`.metadata`, `*.distcp`), as Megatron core writes `torch_dist`.

The index is a pickle, of which nothing runs: a few names become records without behaviour, any other is refused.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.foreign_pickles import read_pickle

INDEX = ".metadata"
_MOST_BYTES = 1 << 30
_SHAPE = "nd_reformulated_orig_global_shape"
_RECORDS = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.",
)
_INERT = (
    ("torch.serialization", "_get_layout"),
    ("torch", "strided"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
)


class Record:
    """Stands for an object of the index: its fields, and no behaviour."""

    def __init__(self, *arguments: object) -> None:
        del arguments

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _stand_in(module: str, name: str) -> Any:
    """What a name of the index becomes."""
    if (module, name) == ("torch", "Size"):
        return tuple
    if (module, name) == ("collections", "OrderedDict"):
        return dict
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return name
    if module.startswith(_RECORDS) or (module, name) in _INERT:
        return Record
    raise ArtifactError(
        f"{INDEX} would run code when it is read",
        got=f"{module}.{name}",
        expected="names of torch's and Megatron's checkpoint formats",
        fix="do not trust this checkpoint; ask its author for safetensors",
    )


@dataclass(frozen=True)
class _StoredPart:
    """Where a part of a tensor lies in the tensor and in which file."""

    offsets: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


class DistributedTensors:
    """The tensors of one checkpoint, read part by part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder / INDEX)
        try:
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(record.size) for name, record in index.state_dict_metadata.items() if "size" in vars(record)
            }
            described = vars(index).get("mcore_data") or {}
            self._flattened: dict[str, tuple[int, ...]] = {
                name: tuple(facts[_SHAPE]) for name, facts in described.items() if _SHAPE in facts
            }
            self.others = tuple(name for name in index.state_dict_metadata if name not in self.shapes)
            self._parts: dict[str, list[_StoredPart]] = {name: [] for name in self.shapes}
            for key, place in index.storage_data.items():
                if key.fqn in self._parts:
                    self._parts[key.fqn].append(_stored_part(key, place, len(self.shapes[key.fqn])))
        except (AttributeError, TypeError, KeyError) as error:
            raise ArtifactError(f"{folder / INDEX} is no index of a distributed checkpoint", got=error) from error

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or of one whose first dimension counts layers the slice of one layer."""
        shape = self.shapes[name]
        first, count = (0, shape[0] if shape else 1) if layer is None else (layer, 1)
        wanted = (count, *shape[1:]) if shape else ()
        whole: Tensor | None = None
        filled = 0
        for stored in self._parts[name]:
            part = self._part(stored, name)
            if shape:
                begin = max(stored.offsets[0], first)
                end = min(stored.offsets[0] + part.shape[0], first + count)
                if begin >= end:
                    continue
                part = part[begin - stored.offsets[0] : end - stored.offsets[0]]
                offsets = (begin - first, *stored.offsets[1:])
            else:
                offsets = ()
            whole = torch.empty(wanted, dtype=part.dtype) if whole is None else whole
            whole[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))] = part
            filled += part.numel()
        if whole is None or filled != whole.numel():
            raise ArtifactError(
                f"{self.folder}: {name} is not complete", got=f"{filled} numbers", expected=torch.Size(wanted).numel()
            )
        if name in self._flattened:
            rows, *rest = self._flattened[name]
            whole = _unflattened(whole, (rows if layer is None else rows // shape[0], *rest))
        return whole if layer is None else whole[0]

    def _part(self, stored: _StoredPart, name: str) -> Tensor:
        path = self.folder / stored.file
        try:
            with path.open("rb") as stream:
                stream.seek(stored.start)
                part = torch.load(io.BytesIO(stream.read(stored.num_bytes)), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged zip makes torch raise
            raise ArtifactError(f"{path}: {name} cannot be read", got=error, fix="copy it again") from error
        shape = self.shapes[name]
        if not isinstance(part, Tensor) or any(
            at + size > most for at, size, most in zip(stored.offsets, part.shape, shape, strict=True)
        ):
            raise ArtifactError(f"{path}: a part of {name} does not fit", expected=shape)
        return part.detach()


def _unflattened(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor that is stored as a grid of blocks, each of them flat in the last dimension."""
    counts = blocks.shape[:-1]
    if len(counts) != len(shape) or any(size % count for size, count in zip(shape, counts, strict=True)):
        raise ArtifactError("a tensor in flat blocks does not fit", got=tuple(blocks.shape), expected=shape)
    sizes = [size // count for size, count in zip(shape, counts, strict=True)]
    order = [axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair]
    return blocks.reshape(*counts, *sizes).permute(order).reshape(shape)


def _stored_part(key: Any, place: Any, dimensions: int) -> _StoredPart:
    offsets = (0,) * dimensions if key.offset is None else tuple(int(each) for each in key.offset)
    file = str(place.relative_path)
    if Path(file).name != file or vars(place).get("transform_descriptors"):
        raise ArtifactError(f"{INDEX} names a file that is not read here", got=file, expected="a plain *.distcp file")
    return _StoredPart(offsets, file, int(place.offset), int(place.length))


def _read_index(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", fix="copy the whole checkpoint, hidden files too")
    if path.stat().st_size > _MOST_BYTES:
        raise ArtifactError(f"{path} is larger than any index", got=path.stat().st_size, expected=_MOST_BYTES)
    try:
        return read_pickle(path.read_bytes(), _stand_in)
    except ArtifactError:
        raise
    except Exception as error:  # whatever a damaged pickle raises
        raise ArtifactError(f"{path} cannot be read", got=error, fix="copy it again") from error


def layer_names(shapes: Mapping[str, Sequence[int]], prefix: str) -> dict[str, tuple[str, int | None]]:
    """Every tensor by its name in a model of single layers, and where it is stored: under which name, in which row.

    Layers of one kind lie stacked under a name without a number.
    """
    found: dict[str, tuple[str, int | None]] = {}
    for name, shape in shapes.items():
        rest = name.removeprefix(prefix)
        if rest == name or rest.split(".")[0].isdigit():
            found[name] = (name, None)
        else:
            found |= {f"{prefix}{layer}.{rest}": (name, layer) for layer in range(shape[0])}
    return found
