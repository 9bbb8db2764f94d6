"""Models of the Hugging Face hub by name, `owner/model` or `owner/model@revision`, wherever a folder is asked for.

`huggingface_hub` fetches and caches them; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.runtime.console import say

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
TEXT_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
MODEL_PATTERNS = (*TEXT_PATTERNS, "*.safetensors")


def folder_of(name: str | Path, patterns: tuple[str, ...]) -> Path:
    """The path as it is, if there is something at it or it is no name of a model; else where the model's files lie."""
    path = Path(name)
    if path.exists() or _NAME.fullmatch(str(name)) is None or path.suffix in (".json", ".model"):
        return path
    return _fetched(str(name), patterns)


def name_and_revision(name: str) -> tuple[str, str | None]:
    """`owner/model@revision` in its two parts; anything else, a folder's path too, is all name."""
    match = _NAME.fullmatch(name)
    return (name, None) if match is None or Path(name).exists() else (match[1], match[2])


def hub_name(name: str) -> tuple[str, str | None]:
    """`owner/model` or `owner/model@revision` in its two parts, whatever lies here under that name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name} is no name on the hub", expected="owner/model or owner/model@branch")
    return match[1], match[2]


def lasting_name(name: str, folder: Path) -> str:
    """How to name later what `folder_of` found: the model at its commit, or the folder's whole path."""
    if folder == Path(name):
        return str(folder.absolute())
    return f"{name_and_revision(name)[0]}@{folder.name}"


@cache
def _fetched(name: str, patterns: tuple[str, ...]) -> Path:
    """Asked of the hub once in a process."""
    match = _NAME.fullmatch(name)
    assert match is not None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{name} is no folder here, and cannot be fetched as a model of the hub",
            got=str(error).split("\n", 1)[0],
            fix="give a folder, or check the name, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from None
    say(f"{name} lies in {folder}")
    return folder
