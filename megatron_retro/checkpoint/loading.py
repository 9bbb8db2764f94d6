"""Loading: the settings of a stored model; checks that a checkpoint is whole and of this model; verified tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from megatron_retro.artifacts.manifest import Manifest, file_record, read_manifest
from megatron_retro.checkpoint.dcp import PaddingLoadPlanner, named_failure
from megatron_retro.checkpoint.directory import KIND, STATE_NAME, VERSION, resolve_checkpoint
from megatron_retro.checkpoint.storage import INDEX_NAME, ShardReader, TensorIndex, read_index
from megatron_retro.config.data import InstructionConfig, TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, build_settings, section_name, specs_by_name
from megatron_retro.config.training import CheckpointConfig, PeftConfig
from megatron_retro.data.model_text import FILE_SETTINGS, kept_text_files
from megatron_retro.errors import ArtifactError, DamagedArtifact
from megatron_retro.runtime.process_group import broadcast_text
from megatron_retro.runtime.store_channel import StoreChannel
from megatron_retro.runtime.strict_json import json_text

_SHOWN = 8


@dataclass(frozen=True)
class Described:
    """What the manifest of a complete checkpoint says; its index, 79 MB at 48B, has not been read."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps that were done when it was written."""
        return int(self.manifest.counts["step"])


@dataclass(frozen=True)
class Checkpoint(Described):
    """A complete checkpoint on disk; nothing but its JSON has been read yet."""

    index: TensorIndex
    state: dict[str, Any]


def describe_checkpoint(path: Path) -> Described:
    """The manifest of the checkpoint at `path` (a run's directory means its newest), cheap enough for every rank."""
    directory = resolve_checkpoint(path)
    return Described(directory, read_manifest(directory, kind=KIND, version=VERSION))


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path` (a run's directory means its newest), its JSON verified, its shards present."""
    described = describe_checkpoint(path)
    directory, manifest = described.path, described.manifest
    for name in (STATE_NAME, INDEX_NAME):
        _require_recorded(directory, name, manifest)
    index = read_index(directory)
    for name, file in index.files.items():
        if manifest.files.get(name) != file.record():
            raise DamagedArtifact(
                f"{directory}: {INDEX_NAME} and the manifest disagree about {name}",
                fix="load another checkpoint of this run",
            )
        if not (directory / name).is_file():
            raise DamagedArtifact(f"{directory / name} is missing", fix="load another checkpoint of this run")
    state = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
    return Checkpoint(directory, manifest, index, state)


def open_together(path: Path, channel: StoreChannel, device: torch.device) -> Checkpoint:
    """The same on every rank of the default group, where the first alone reads the index and looks for the shards."""
    opened: Checkpoint | None = None

    def open_first() -> str:
        nonlocal opened
        opened = open_checkpoint(path)
        return str(opened.path)

    directory = Path(channel.first(open_first))
    shared = broadcast_text("" if opened is None else opened.index.to_shared(), device)

    def open_from_index() -> str:
        nonlocal opened
        if opened is None:
            manifest = read_manifest(directory, kind=KIND, version=VERSION)
            _require_recorded(directory, STATE_NAME, manifest)
            state = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
            opened = Checkpoint(directory, manifest, TensorIndex.from_shared(shared), state)
        return ""

    channel.gather(open_from_index)
    assert opened is not None
    return opened


def _require_recorded(directory: Path, name: str, manifest: Manifest) -> None:
    path = directory / name
    if not path.is_file():
        raise DamagedArtifact(f"{path} is missing", fix="load another checkpoint of this run")
    if name not in manifest.files or file_record(path) != manifest.files[name]:
        raise DamagedArtifact(
            f"{path} does not belong to the manifest beside it, or has changed since it was written (checksum)",
            fix="load another checkpoint of this run",
        )


def require_same_model(checkpoint: Checkpoint, expected: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
    """Refuse a checkpoint of another model, naming every setting that differs.

    `expected` holds the sections (section -> field -> value) that make the model what it is.
    """
    differences = changed_settings(checkpoint, expected, ignored)
    if differences:
        raise ArtifactError(
            f"{checkpoint.path} is the state of another model",
            got=described_changes(differences),
            fix="give the settings of that model, or another --load; to add a retriever to a GPT use `retrofit`",
        )


def changed_settings(
    checkpoint: Described, sections: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Flags whose value is another than when the checkpoint was written: (there, here)."""
    changed = {}
    for section, fields in json.loads(json_text(sections)).items():
        stored = checkpoint.manifest.config.get(section, {})
        for name, value in fields.items():
            if name not in ignored and name in stored and stored[name] != value:
                changed[f"--{name.replace('_', '-')}"] = (stored[name], value)
    return changed


def described_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """In one line; empty when nothing changed."""
    return "; ".join(f"{flag}: {there!r} there, {here!r} here" for flag, (there, here) in changed.items())


def require_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], true_rows: Mapping[str, int]) -> None:
    """Refuse a checkpoint that lacks a tensor or has one of another size."""
    sizes = checkpoint.index.sizes
    missing = [name for name in tensors if name not in sizes]
    wrong = []
    for name, tensor in tensors.items():
        size = list(tensor.size())
        if name in true_rows:
            size[0] = true_rows[name]
        if name in sizes and list(sizes[name]) != size:
            wrong.append(f"{name} is {list(sizes[name])} there, {size} here")
    problems = [f"{name} is not there" for name in missing] + wrong
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ArtifactError(
            f"{checkpoint.path} does not fit this model",
            got="; ".join(problems[:_SHOWN]) + more,
            fix="give the settings of that model, or another --load; to add a retriever use `retrofit`",
        )


def load_tensors(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    true_rows: Mapping[str, int] | None = None,
    channel: StoreChannel | None = None,
) -> None:
    """Fill `tensors` in place, on any layout; every byte that is read is verified.

    Each rank reads what it holds. With a channel, all of its ranks call it, and what one of them refuses all do.
    """
    rows = true_rows or {}

    def loaded() -> str:
        require_tensors(checkpoint, tensors, rows)
        with named_failure(checkpoint.path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # nothing is to be agreed on
            load_distributed(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_reader=ShardReader(checkpoint.path, checkpoint.index, tensors),
                planner=PaddingLoadPlanner(rows),
                no_dist=True,
            )
        return ""

    (channel or StoreChannel()).gather(loaded)


_SECTIONS = (ModelConfig, RetroConfig, TokenizerConfig, PeftConfig)


def stored_settings(checkpoint: Described) -> Settings:
    """The sections that make the model, as they were when it was trained."""
    return _stored(checkpoint, _SECTIONS)


def stored_instructions(checkpoint: Described) -> InstructionConfig | None:
    """How its conversations were written, if it was tuned on any."""
    if section_name(InstructionConfig) not in checkpoint.manifest.config:
        return None
    return _stored(checkpoint, (InstructionConfig,))[InstructionConfig]


def _stored(checkpoint: Described, sections: Sequence[type]) -> Settings:
    """What stood in these sections once and stands in another one now is no longer the model's."""
    values: dict[str, Any] = {}
    known, elsewhere = specs_by_name(sections), specs_by_name(ALL_SECTIONS)
    for section in sections:
        stored: Mapping[str, Any] = checkpoint.manifest.config.get(section_name(section), {})
        unknown = [name for name in stored if name not in known and name not in elsewhere]
        if unknown:
            raise ArtifactError(
                f"{checkpoint.path} has settings that this version does not know",
                got=", ".join(unknown),
                fix="use the version of megatron_retro that wrote it",
            )
        values.update({name: value for name, value in stored.items() if name in known and value is not None})
    return build_settings(sections, values, {})


def base_path(checkpoint: Described) -> Path:
    """Where the frozen model lies that a run tuned beside."""
    stored = str(checkpoint.manifest.config.get(section_name(CheckpointConfig), {}).get("load") or "")
    return resolved_from(stored, checkpoint.path)


def open_base(checkpoint: Described) -> Checkpoint:
    """That model's checkpoint."""
    return open_checkpoint(base_path(checkpoint))


def resolved_from(stored: str, checkpoint: Path) -> Path:
    """A path as a run noted it; a relative one also counts from a folder above the run."""
    path = Path(stored)
    if path.is_absolute() or path.exists():
        return path
    places = (folder / path for folder in checkpoint.resolve().parents)
    return next((place for place in places if place.exists()), path)


def found_tokenizer(config: TokenizerConfig, checkpoint: Path) -> TokenizerConfig:
    """The tokenizer's files as they are seen from here: the run's own copies, else where the run found them.

    A relative path also counts from a folder above the run.
    """
    kept = kept_text_files(config, checkpoint.parent)
    values = {name: getattr(config, name) for name in FILE_SETTINGS}
    found: dict[str, Any] = {
        name: str(resolved_from(value, checkpoint))
        for name, value in values.items()
        if value is not None and getattr(kept, name) == value
    }
    return replace(kept, **found)
