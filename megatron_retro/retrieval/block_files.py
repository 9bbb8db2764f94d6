"""Files of arrays with a checksum per array: codes and vectors of one block of chunks.

A safetensors file, so that a reader maps it and takes rows without reading the rest; the checksums are in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import checksum_of
from megatron_retro.artifacts.files import new_file
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.strict_json import json_text

_ABOUT = "block"
_READABLE = 0o644
_REMEDY = "remove this file and run the same command again: only this block is made again"


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Write a block atomically; `facts` say what it was made from."""
    from safetensors.numpy import save_file

    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One entry: safetensors writes several in an order that changes from run to run.
    header = {_ABOUT: json_text({"facts": facts, "crc32": _checksums(ordered)}, sort_keys=True)}
    with new_file(path) as partial:
        save_file(ordered, partial, metadata=header)
        partial.chmod(_READABLE)


def map_arrays(path: Path, facts: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of a block as views of the file, made from the same facts; checksums are `verify_arrays`'."""
    header, content = _opened(path)
    found = _about(header)["facts"]
    wrong = sorted(name for name in facts if found.get(name) != facts[name])
    if wrong:
        raise ArtifactError(
            f"{path}: {wrong[0]} does not match", got=found.get(wrong[0]), expected=facts[wrong[0]], fix=_REMEDY
        )
    return {
        name: content[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def verify_arrays(path: Path, facts: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The same, with every byte checked."""
    arrays = map_arrays(path, facts)
    expected = _about(_opened(path)[0])["crc32"]
    damaged = sorted(name for name, value in _checksums(arrays).items() if value != expected[name])
    if damaged:
        raise ArtifactError(f"{path} is damaged: the checksum of {', '.join(damaged)} is wrong", fix=_REMEDY)
    return arrays


def facts_of(path: Path) -> dict[str, Any]:
    """What a block says that it was made from."""
    facts: dict[str, Any] = _about(_opened(path)[0])["facts"]
    return facts


_DTYPES = {"I64": np.int64, "U8": np.uint8, "U16": np.uint16, "F32": np.float32, "I32": np.int32}


def _opened(path: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """The parsed header and the bytes behind it."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
        length = int(content[:8].view("<u8")[0])
        header = json.loads(bytes(content[8 : 8 + length]))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if len(content) != 8 + length + end:
            raise ValueError(f"{len(content)} bytes, not {8 + length + end}")
        return header, content[8 + length :]
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="run the same command again") from None
    except (ValueError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged", got=error, fix=_REMEDY) from None


def _about(header: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(header["__metadata__"][_ABOUT])
    return content


def _checksums(arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    return {name: checksum_of(array.reshape(-1).view(np.uint8).data) for name, array in arrays.items()}
