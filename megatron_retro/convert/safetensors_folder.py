"""A folder of safetensors as Hugging Face lays it out: one file, or shards with an index; tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_retro.artifacts.files import disk_problem, write_file
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.strict_json import json_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """Tensors by name; each is read from its file when it is asked for, so no file is ever whole in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = self._files()

    def _files(self) -> dict[str, Path]:
        """Name -> file."""
        index = self.path / INDEX
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(_is_file_name(file) for file in names.values()):
                raise ArtifactError(
                    f"{index} does not name files beside it",
                    got=f"weight_map = {str(names)[:200]}",
                    expected="tensor names, each with the name of a file of this folder",
                    fix="fetch the folder again, from where you trust",
                )
            missing = sorted({file for file in names.values() if not (self.path / file).is_file()})
            if missing:
                raise ArtifactError(f"{self.path} lacks shards that its index names", got=", ".join(missing[:5]))
            return {name: self.path / file for name, file in names.items()}
        single = self.path / SINGLE
        if not single.is_file():
            raise ArtifactError(
                f"{self.path} holds no safetensors",
                expected=f"{SINGLE} or {INDEX}",
                fix="save the model with save_pretrained(..., safe_serialization=True)",
            )
        with opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the file's head alone."""
        with opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _is_file_name(name: object) -> bool:
    """A plain name: no path leads out of the folder by it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def opened(path: Path) -> Any:
    """A safetensors file to read from."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        damaged = ArtifactError(f"{path} is no intact safetensors file", got=error, fix="fetch it again")
        raise disk_problem(error) or damaged from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise disk_problem(error) or ArtifactError(f"{path} cannot be read", got=error) from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} cannot be read", got=f"a JSON {type(content).__name__}", expected="an object")
    return content


def write_folder(path: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors in shards of about `shard_bytes`; at most one shard is in memory."""
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, shard_bytes), 1):
        file = path / f"part-{number:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, file, metadata={"format": "pt"})
        shards.append((file, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        shards[0][0].rename(path / SINGLE)
        return
    names: dict[str, str] = {}
    for number, (file, held) in enumerate(shards, 1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(path / final)
        names |= dict.fromkeys(held, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    write_file(path / INDEX, json_text(index, indent=1) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
