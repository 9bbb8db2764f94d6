"""What a model's text needs beside its weights: tokenizer, special tokens, chat template, generation settings.

A run keeps copies of these files in its folder `tokenizer/`. It can be moved without what it came from, and it hands
them on to the runs that start from it and to its exports.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import make_folder, write_file
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.data.hub import TEXT_PATTERNS, folder_of
from megatron_retro.errors import ArtifactError

FOLDER = "tokenizer"
FILE_SETTINGS = ("tokenizer_model", "vocab_file", "merge_file")
TOKENIZER_JSON, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
_COMPANIONS = (
    TOKENIZER_JSON, TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", CHAT_TEMPLATE, "chat_template.json", GENERATION,
)  # fmt: skip


def text_folder(config: TokenizerConfig) -> Path | None:
    """Where the tokenizer lies; None for one that needs no file."""
    named = next((Path(path) for name in FILE_SETTINGS if (path := getattr(config, name)) is not None), None)
    if named is not None and config.tokenizer_type == "HuggingFaceTokenizer":
        named = folder_of(named, TEXT_PATTERNS)
    return named if named is None or named.is_dir() else named.parent


def text_files(config: TokenizerConfig) -> dict[str, Path]:
    """The files that the settings name and those that a model has beside them, by name."""
    folder = text_folder(config)
    if folder is None:
        return {}
    named = [Path(path) for path in (getattr(config, name) for name in FILE_SETTINGS) if path is not None]
    return {path.name: path for path in (*(folder / name for name in _COMPANIONS), *named) if path.is_file()}


def keep_text_files(config: TokenizerConfig, run: Path) -> TokenizerConfig:
    """Copy these files into the run's folder; returns the settings that name the copies, seen from the run."""
    files, folder = text_files(config), run / FOLDER
    if files and not any(path.parent.absolute() == folder.absolute() for path in files.values()):
        contents = {name: read_text_file(path) for name, path in files.items()}
        make_folder(folder)
        for old in folder.iterdir():
            if old.name not in contents:
                old.unlink()
        for name, content in contents.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                write_file(folder / name, content)
    return _naming(config, {name: Path(FOLDER) / name for name in files})


def kept_text_files(config: TokenizerConfig, run: Path) -> TokenizerConfig:
    """The settings with the run's own copies wherever it has them."""
    return _naming(config, {path.name: path for path in (run / FOLDER).glob("*")})


def _naming(config: TokenizerConfig, places: dict[str, Path]) -> TokenizerConfig:
    changes: dict[str, Any] = {}
    for setting in FILE_SETTINGS:
        path = getattr(config, setting)
        if path is None:
            continue
        name = Path(path).name
        if name not in places and config.tokenizer_type == "HuggingFaceTokenizer":
            name = TOKENIZER_JSON  # a folder was named
        if name in places:
            changes[setting] = str(places[name])
    return replace(config, **changes)


def read_text_file(path: Path) -> bytes:
    """A file of a tokenizer, or an error that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the tokenizer file {path}", got=error.strerror) from None


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object beside a tokenizer; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read", got=error, expected="a JSON object") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} cannot be read", got=type(found).__name__, expected="a JSON object")
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like as text."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_SETTINGS):
        for key, value in read_settings(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def end_ids(folder: Path) -> frozenset[int]:
    """The ids that end an answer, as `generation_config.json` names them."""
    value = read_settings(folder / GENERATION).get("eos_token_id")
    return frozenset(one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def chat_template(folder: Path) -> str | None:
    """The template that a model was tuned with: a file of its own, or a text in `tokenizer_config.json`."""
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        return read_text_file(path).decode("utf-8", errors="replace")
    for name in ("chat_template.json", TOKENIZER_SETTINGS):
        found = read_settings(folder / name).get("chat_template")
        if isinstance(found, list):  # several with names
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None
