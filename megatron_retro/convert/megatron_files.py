"""Megatron-LM's files: `mp_rank_XX/model_optim_rng.pt`, read without running anything that they contain.

They are pickles. Only tensors, plain containers and argparse's namespace are built; Megatron's own classes
(enumerations among the arguments) become inert placeholders, and any other name is refused.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_retro.errors import ArtifactError

FILE = "model_optim_rng.pt"
COMMON = "common.pt"
_LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d\d)")
_OLDEST_VERSION = 2.0


class Placeholder:
    """Stands for an object of Megatron's; keeps nothing and does nothing."""

    def __init__(self, *arguments: object) -> None:
        del arguments


@dataclass(frozen=True)
class MegatronCheckpoint:
    """The model's tensors of every tensor-parallel rank, and the arguments of the run."""

    path: Path
    arguments: Mapping[str, Any]
    shards: tuple[Mapping[str, Tensor], ...]
    skipped: tuple[str, ...]


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like such a checkpoint."""
    return bool(_rank_folders(path)) or (path / _LATEST).is_file() or is_distributed(path)


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
    return sorted(child for child in path.iterdir() if _RANK.match(child.name))


def read_megatron(path: Path) -> MegatronCheckpoint:
    """All shards, mapped from disk rather than read."""
    folder = iteration_folder(path)
    ranks = _rank_folders(folder)
    expected = [f"mp_rank_{number:02}" for number in range(len(ranks))]
    if not ranks or [rank.name for rank in ranks] != expected:
        raise ArtifactError(
            f"{folder} has not the ranks of one tensor-parallel group",
            got=", ".join(rank.name for rank in ranks) or "none",
            expected="mp_rank_00, mp_rank_01, ... without a pipeline split",
        )
    files = [_load(rank / FILE) for rank in ranks]
    arguments = vars(files[0].get("args", argparse.Namespace()))
    _require_known_order(folder, files[0], arguments, len(ranks))
    flat = [_flattened(file["model"]) for file in files]
    tensors = tuple(
        {_modern(name): value for name, value in shard.items() if isinstance(value, Tensor)} for shard in flat
    )
    skipped = [key for key in files[0] if key not in ("model", "args")]
    skipped += [f"model.{name}" for name, value in flat[0].items() if not isinstance(value, Tensor)]
    return MegatronCheckpoint(folder, arguments, tensors, tuple(skipped))


def iteration_folder(path: Path) -> Path:
    """The folder of the latest iteration, or the path itself."""
    latest = path / _LATEST
    if _rank_folders(path) or not latest.is_file():
        return path
    text = latest.read_text(encoding="utf-8").strip()
    folder = path / (text if text == "release" else f"iter_{int(text):07}")
    if not folder.is_dir():
        raise ArtifactError(f"{latest} names a folder that is not there", got=folder)
    return folder


def _load(path: Path) -> dict[str, Any]:
    content = _content(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ArtifactError(f"{path} holds no model", expected="a dictionary with 'model' and 'args'")
    return content


def _content(path: Path) -> Any:
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not path.is_file():
        raise ArtifactError(f"{path} is missing", fix="copy every mp_rank folder")
    known: list[Any] = [argparse.Namespace, *_numpy_names()]
    try:
        foreign = [name for name in get_unsafe_globals_in_checkpoint(path) if not _is_known(name, known)]
        refused = [name for name in foreign if not name.startswith("megatron.")]
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


def _require_known_order(folder: Path, file: Mapping[str, Any], arguments: Mapping[str, Any], num_ranks: int) -> None:
    version = float(file.get("checkpoint_version", 0))
    if version < _OLDEST_VERSION:
        raise ArtifactError(
            f"{folder} orders queries, keys and values in an older way", got=version, expected=_OLDEST_VERSION
        )
    for name, expected in (("tensor_model_parallel_size", num_ranks), ("pipeline_model_parallel_size", 1)):
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


def _modern(name: str) -> str:
    """Older files say layernorm."""
    return name.replace("layernorm", "norm")
