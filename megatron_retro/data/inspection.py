"""`inspect`: explain any artifact: what, made from what, by which settings, intact or where not.

Of a run whose collectives did not end it tells who is to blame, and what each rank last came to.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_retro.artifacts.files import TEMPORARY_MARK
from megatron_retro.artifacts.manifest import MANIFEST_NAME, Manifest, damage, load_manifest, manifest_path
from megatron_retro.artifacts.object_store import is_url
from megatron_retro.data.token_file import TokenFile, checksums_path
from megatron_retro.data.token_writer import verify_token_file
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.console import readable_bytes
from megatron_retro.runtime.flight_recorder import explained, read_flights
from megatron_retro.runtime.run_log import CULPRITS, FLIGHT

_COLUMNS = 100
# Files that never stand without a manifest beside them, but in a folder that is being filled.
_NEVER_ALONE = ("chunks-before-document.i64", "checksums.blocks", "index.faiss", "trained.faiss", "tensors.json")


def inspect(paths: Sequence[str]) -> None:
    """Explain each path; fail if anything is damaged."""
    faults: list[str] = []
    if stored := [path for path in paths if is_url(path)]:
        verified = "copy it to a disk; what a run reads of it is verified as it is read"
        raise ArtifactError(f"{stored[0]} lies in an object store, and `inspect` reads all of a file", fix=verified)
    for path in map(Path, paths):
        if (told := _last_failure(path)) is not None:
            print(told)
            if not any(path.rglob(f"*{MANIFEST_NAME}")):
                continue
        if (prefix := _foreign_tokens(path)) is not None:
            faults += [f"{prefix}: {problem}" for problem in _explain_foreign_tokens(prefix)]
            continue
        faults += [f"{folder}: its manifest is gone, or it was never finished" for folder in _without_manifest(path)]
        for artifact in _artifacts(path):
            manifest = load_manifest(artifact)
            problems = damage(artifact, manifest)
            print("\n".join(_explanation(artifact, manifest, problems)))
            faults += [f"{artifact}: {problem}" for problem in problems]
    if faults:
        raise ArtifactError("not intact:\n  " + "\n  ".join(faults), fix="rebuild what is damaged from its inputs")


def _last_failure(path: Path) -> str | None:
    """What a run's directory, or its folder of flight records, says of a collective that did not end."""
    run = path.parent if path.name == FLIGHT else path
    lines = []
    if (run / CULPRITS).is_file():
        try:
            facts = json.loads((run / CULPRITS).read_text(encoding="utf-8"))
            lines.append(f"{run / CULPRITS}: step {facts['step']}: {facts['words']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{run / CULPRITS} is damaged", got=repr(error)[:200]) from None
    if (run / FLIGHT).is_dir() and (flights := read_flights(run / FLIGHT)):
        lines += [f"{run / FLIGHT}: {line}" if number == 0 else line for number, line in enumerate(explained(flights))]
    return "\n".join(lines) if lines else None


def _foreign_tokens(path: Path) -> Path | None:
    """The prefix of a token file that another program wrote, which has no manifest."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = (prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx"))
    return prefix if all(file.is_file() for file in pair) and not manifest_path(prefix).exists() else None


def _explain_foreign_tokens(prefix: Path) -> list[str]:
    """Print what can be said without a manifest; returns what is wrong."""
    problems = verify_token_file(prefix)
    if checksums_path(prefix).exists():
        problems.append("its manifest is gone: the checksums beside it were written together with one")
    print(f"{prefix}\n  what         tokens of another program: no manifest, so no checksums")
    if not problems:
        file = TokenFile(prefix)
        told = [f"documents = {file.num_documents}", f"dtype = {file.dtype}", f"tokens = {file.num_tokens}"]
        print("\n".join(f"  {title:<11}  {line}" for title, line in zip(("counts", "", ""), told, strict=True)))
    print(f"  state        {'DAMAGED' if problems else 'its parts fit together'}")
    return problems


def _artifacts(path: Path) -> Iterator[Path]:
    """The artifacts that a path names: itself, the group of files it belongs to, or all that it holds."""
    if path.is_dir() and not (path / MANIFEST_NAME).exists():
        found = sorted(file for file in path.rglob(f"*{MANIFEST_NAME}") if TEMPORARY_MARK not in str(file))
        if not found:
            raise ArtifactError(f"{path} holds nothing of ours", expected=f"a {MANIFEST_NAME} somewhere below")
        for file in found:
            yield file.parent if file.name == MANIFEST_NAME else _prefix_of(file)
    elif path.is_file():
        yield path.parent if (path.parent / MANIFEST_NAME).exists() else _prefix_of(path)
    elif path.exists() or manifest_path(path).exists():
        yield path
    else:
        raise ArtifactError(f"there is nothing at {path}", fix="give the path of an artifact, or a folder of artifacts")


def _without_manifest(path: Path) -> list[Path]:
    """Folders below a path that hold a file of an artifact and no manifest; unfinished work may."""
    folders = {file.parent for name in _NEVER_ALONE for file in path.rglob(name)} if path.is_dir() else set()
    lost = {folder for folder in folders if not (folder / MANIFEST_NAME).exists()}
    return sorted(one for one in lost if TEMPORARY_MARK not in str(one) and "work" not in one.relative_to(path).parts)


def _prefix_of(file: Path) -> Path:
    """`corpus_text_document.bin` -> `corpus_text_document`."""
    name = file.name.removesuffix("." + MANIFEST_NAME)
    prefixes = (file.with_name(name), file.with_suffix(""))
    found = next((prefix for prefix in prefixes if manifest_path(prefix).exists()), None)
    if found is None:
        raise ArtifactError(
            f"{file} is no file of ours, or was never finished",
            expected=f"{manifest_path(prefixes[1])} or {file.with_name(MANIFEST_NAME)} beside it",
            fix="give an artifact, or run the command that builds it again",
        )
    return found


def _explanation(artifact: Path, manifest: Manifest, problems: Sequence[str]) -> list[str]:
    lines = [
        f"{artifact}",
        f"  what         {manifest.kind}, format version {manifest.version}",
        f"  written      {manifest.written_at} by {manifest.written_by}",
        f"  fingerprint  {manifest.fingerprint}",
    ]
    for title, values in (("made from", manifest.inputs), ("settings", manifest.config), ("counts", manifest.counts)):
        told = [line for key, value in sorted(values.items()) for line in _told(key, value)]
        lines += [f"  {title if number == 0 else '':<11}  {line}" for number, line in enumerate(told)]
    total = sum(record.bytes for record in manifest.files.values())
    lines.append(f"  files        {len(manifest.files)}, {readable_bytes(total)}")
    lines.append("  state        " + ("intact" if not problems else f"DAMAGED: {'; '.join(problems)}"))
    return lines


def _told(key: str, value: object) -> list[str]:
    """One value; a section of settings as wrapped lines of what is set."""
    if not isinstance(value, dict):
        return [f"{key} = {value}"]
    known = ", ".join(f"{name}={one}" for name, one in sorted(value.items()) if one is not None)
    return textwrap.wrap(f"[{key}] {known}", _COLUMNS, subsequent_indent="    ", break_on_hyphens=False)
