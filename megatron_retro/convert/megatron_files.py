"""Megatron-LM's files: `mp_rank_XX[_YYY]/model_optim_rng.pt`, read without running anything that they contain.

They are pickles. Only tensors, plain containers and argparse's namespace are built; Megatron's own classes
(enumerations among the arguments) become inert placeholders, and any other name is refused. XX is the tensor rank, YYY
the pipeline rank, whose layers count from 0 in the file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_retro.artifacts.manifest import file_record
from megatron_retro.convert.megatron_adam import KINDS, NONE, listed_moments
from megatron_retro.errors import ArtifactError

FILE = "model_optim_rng.pt"
COMMON = "common.pt"
LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
_MODEL = re.compile(r"model\d*")
_LAYER = re.compile(r"((?:language_model\.encoder|decoder)\.layers\.)(\d+)(\..*)")
_INERT = ("megatron.", "_io.BytesIO")
_OLDEST_VERSION = 2.0


class Placeholder:
    """Stands for an object of Megatron's; keeps nothing and does nothing."""

    def __init__(self, *arguments: object) -> None:
        del arguments

    def __setstate__(self, state: object) -> None:
        del state


@dataclass(frozen=True)
class MegatronCheckpoint:
    """The model's tensors of every tensor-parallel rank, pipeline stages joined, and the arguments of the run.

    `moments` holds Adam's state in the same way, for each kind; where there is none, `no_moments` says why.
    `content` is the first rank's file.
    """

    path: Path
    arguments: Mapping[str, Any]
    shards: tuple[Mapping[str, Tensor], ...]
    moments: Mapping[str, tuple[Mapping[str, Tensor], ...]]
    no_moments: str
    content: Mapping[str, Any]
    skipped: tuple[str, ...]

    def fingerprint(self) -> dict[str, str]:
        """What an import records of its source: the first rank's file."""
        return {FILE: file_record(_rank_folders(self.path)[0] / FILE).sha256}


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like such a checkpoint."""
    return bool(_rank_folders(path)) or (path / LATEST).is_file() or is_distributed(path)


def is_distributed(folder: Path) -> bool:
    """Whether the folder of an iteration is in the format `torch_dist`."""
    return (folder / COMMON).is_file()


def read_common(folder: Path) -> dict[str, Any]:
    """What such a checkpoint holds beside its tensors, with the arguments of the run."""
    content = _content(folder / COMMON)
    if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
        raise ArtifactError(f"{folder / COMMON} holds no arguments", expected="a training checkpoint of Megatron-LM")
    return content


def _rank_folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if _RANK.fullmatch(child.name))


def read_megatron(path: Path) -> MegatronCheckpoint:
    """All shards, mapped from disk rather than read."""
    folder = iteration_folder(path)
    grid = _grid(folder)
    files = [[_load(place / FILE) for place in stages] for stages in grid]
    first = files[0][0]
    arguments = vars(first.get("args", argparse.Namespace()))
    _require_known_order(folder, first, arguments, len(grid), len(grid[0]))
    shards = [_joined_stages(stages) for stages in files]
    tensors = tuple({name: value for name, value in shard.items() if isinstance(value, Tensor)} for shard in shards)
    skipped = [key for key in first if not _MODEL.fullmatch(key) and key != "args"]
    others = len(shards[0]) - len(tensors[0])
    skipped += [f"{others} entries of the model that are no tensors"] if others else []
    moments, no_moments = _moments(files)
    return MegatronCheckpoint(folder, arguments, tensors, moments, no_moments, first, tuple(skipped))


def _moments(
    files: Sequence[Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, tuple[Mapping[str, Tensor], ...]], str]:
    """Adam's state of each tensor rank, joined as its model is; or why there is none."""
    listed = [
        [listed_moments(file, [(key, _flattened(file[key])) for key in _model_keys(file)]) for file in stages]
        for stages in files
    ]
    problems = {problem for stages in listed for _, problem in stages if problem}
    if problems:
        return {}, "; ".join(sorted(problems - {NONE.problem}) or problems)
    return {
        kind: tuple(_joined_stages([found[kind] for found, _ in stages]) for stages in listed) for kind in KINDS
    }, ""


def _model_keys(file: Mapping[str, Any]) -> list[str]:
    """The parts of a model, in order."""
    keys = (key for key in file if _MODEL.fullmatch(key))
    return sorted(keys, key=lambda key: int(key[len("model") :] or 0))


def _grid(folder: Path) -> list[list[Path]]:
    """The folders of each tensor rank, by its pipeline ranks."""
    found = {_place(child): child for child in _rank_folders(folder)}
    tensor_size, pipeline_size = (1 + max((place[axis] for place in found), default=-1) for axis in (0, 1))
    places = [(rank, stage) for rank in range(tensor_size) for stage in range(pipeline_size)]
    if not found or sorted(found) != places:
        raise ArtifactError(
            f"{folder} has not the ranks of one tensor-parallel group",
            got=", ".join(child.name for child in found.values()) or "none",
            expected="mp_rank_00, mp_rank_01, ..., or mp_rank_00_000, ... of every tensor and pipeline rank",
        )
    return [[found[rank, stage] for stage in range(pipeline_size)] for rank in range(tensor_size)]


def _place(folder: Path) -> tuple[int, int]:
    match = _RANK.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _joined_stages(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What one tensor rank holds, with the model's own numbers of layers.

    Where a pipeline rank has several parts, the first parts of all ranks come before the second ones.
    """
    joined: dict[str, Any] = {}
    before = 0
    for key in _model_keys(files[0]):
        for file in files:
            numbers = [0]
            for name, value in _flattened(file.get(key, {})).items():
                if match := _LAYER.fullmatch(name):
                    numbers.append(int(match[2]) + 1)
                    name = f"{match[1]}{before + int(match[2])}{match[3]}"
                joined[name] = value
            before += max(numbers)
    return joined


def iteration_folder(path: Path) -> Path:
    """The folder of the latest iteration, or the path itself."""
    latest = path / LATEST
    if _rank_folders(path) or not latest.is_file():
        return path
    text = latest.read_text(encoding="utf-8").strip()
    folder = path / (text if text == "release" else f"iter_{int(text):07}")
    if not folder.is_dir():
        raise ArtifactError(f"{latest} names a folder that is not there", got=folder)
    return folder


def _load(path: Path) -> dict[str, Any]:
    content = _content(path)
    if not isinstance(content, dict) or not any(isinstance(content.get(key), dict) for key in ("model", "model0")):
        raise ArtifactError(f"{path} holds no model", expected="a dictionary with 'model' and 'args'")
    return content


def _content(path: Path) -> Any:
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not path.is_file():
        raise ArtifactError(f"{path} is missing", fix="copy every mp_rank folder")
    known: list[Any] = [argparse.Namespace, *_numpy_names()]
    try:
        foreign = [name for name in get_unsafe_globals_in_checkpoint(path) if not _is_known(name, known)]
        refused = [name for name in foreign if not name.startswith(_INERT)]
        if refused:
            raise ArtifactError(
                f"{path} would run code when it is read",
                got=", ".join(refused),
                expected="tensors, containers and Megatron's own classes",
                fix="do not trust this file; ask its author for safetensors",
            )
        with safe_globals([*known, *((Placeholder, name) for name in foreign)]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # whatever a damaged pickle or zip makes torch raise
        raise ArtifactError(f"{path} cannot be read", got=error, fix="copy it again") from error
    return content


def _numpy_names() -> list[Any]:
    """What a saved random state of numpy is made of."""
    reconstruct = np.zeros(1).__reduce__()[0]
    old_name = (reconstruct, "numpy.core.multiarray._reconstruct")
    return [reconstruct, old_name, np.ndarray, np.dtype, type(np.dtype(np.uint32)), type(np.dtype(np.int64))]


def _is_known(name: str, known: list[Any]) -> bool:
    names = [item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in known]
    return name in names


def _require_known_order(
    folder: Path, file: Mapping[str, Any], arguments: Mapping[str, Any], tensor_size: int, pipeline_size: int
) -> None:
    version = float(file.get("checkpoint_version", 0))
    if version < _OLDEST_VERSION:
        raise ArtifactError(
            f"{folder} orders queries, keys and values in an older way", got=version, expected=_OLDEST_VERSION
        )
    sizes = {"tensor_model_parallel_size": tensor_size, "pipeline_model_parallel_size": pipeline_size}
    for name, expected in sizes.items():
        if arguments.get(name, expected) != expected:
            raise ArtifactError(f"{folder}: {name} does not match its folders", got=arguments[name], expected=expected)


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
