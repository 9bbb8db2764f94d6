"""What an artifact says of itself: kind, version, inputs, configuration, counts, checksums.

The manifest is written last, so its presence means finished. Its fingerprint covers all of it but the date, so an
artifact made of artifacts names them exactly. A reader refuses what does not match, naming the field and both values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_retro import __version__
from megatron_retro.artifacts.block_checksums import PREFIX, blocks_digest, read_block_checksums
from megatron_retro.artifacts.files import TEMPORARY_MARK, recover_directory, write_file
from megatron_retro.errors import ArtifactError, DamagedArtifact

MANIFEST_NAME = "manifest.json"
_READ_BYTES = 1 << 22
_SEAL = "seal"


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file: its SHA-256, or the digest of its block checksums."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest file."""

    kind: str
    version: int
    inputs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    written_by: str = f"megatron_retro {__version__}"
    written_at: str = ""

    @property
    def fingerprint(self) -> str:
        """Changes with anything but the date and the program's version."""
        content = asdict(self)
        del content["written_at"], content["written_by"]
        return hashlib.sha256(_canonical(content)).hexdigest()

    def to_json(self) -> str:
        """The text on disk; it carries its own checksum, so that an edit is noticed."""
        content = asdict(self)
        content["fingerprint"] = self.fingerprint
        content[_SEAL] = _seal(content)
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """A small file that is no artifact of its own, with its checksum inside."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    text = json.dumps({**plain, _SEAL: _seal(plain)}, indent=1, sort_keys=True, allow_nan=False)
    write_file(path, text + "\n")


def read_sealed_json(path: Path, fields: Collection[str], *, fix: str) -> dict[str, Any]:
    """What `write_sealed_json` wrote; files of earlier versions, which have no seal, must have exactly `fields`."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop(_SEAL, None)
        missing, unknown = set(fields) - set(content), set(content) - set(fields)
        if missing or unknown:
            raise ValueError(f"lacks {sorted(missing)}, has {sorted(unknown)} besides")
        if seal is not None and seal != _seal(content):
            raise ValueError("its checksum does not match")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArtifact(f"{path} is damaged", got=error, fix=fix) from None
    return content


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file, read in blocks."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def unchanged(path: Path, record: FileRecord) -> bool:
    """Whether a file has the recorded checksum, of whichever kind it is."""
    if record.sha256.startswith(PREFIX):
        return blocks_digest(read_block_checksums(path)) == record.sha256
    return file_record(path) == record


def file_records(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Records of several files, hashed in parallel."""
    ordered = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(ordered, pool.map(lambda name: file_record(directory / name), ordered), strict=True))


def manifest_path(artifact: Path) -> Path:
    """`DIR/manifest.json` for a directory, `PREFIX.manifest.json` for a group of files with one prefix."""
    if artifact.is_dir():
        return artifact / MANIFEST_NAME
    return artifact.with_name(f"{artifact.name}.{MANIFEST_NAME}")


def write_manifest(
    artifact: Path,
    *,
    kind: str,
    version: int,
    inputs: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    files: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Describe an artifact. Without `files`, every file of the directory is hashed; give records made while writing."""
    path = manifest_path(artifact)
    if files is None:
        names = [str(file.relative_to(artifact)) for file in artifact.rglob("*") if file.is_file() and file != path]
        files = file_records(artifact, names)
    manifest = Manifest(
        kind=kind,
        version=version,
        inputs=dict(inputs or {}),
        config=json.loads(json.dumps(config or {}, allow_nan=False)),
        counts=dict(counts or {}),
        files=dict(files),
        written_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    write_file(path, manifest.to_json())
    return manifest


def read_manifest(artifact: Path, *, kind: str, version: int) -> Manifest:
    """The manifest of an artifact of the given kind; anything else is refused by name."""
    manifest = load_manifest(artifact)
    if manifest.kind != kind:
        raise ArtifactError(f"{artifact} is another kind of artifact", got=manifest.kind, expected=kind)
    if manifest.version > version:
        raise ArtifactError(
            f"{artifact} was written by a newer format",
            got=f"{kind} version {manifest.version} ({manifest.written_by})",
            expected=f"version {version} or older",
            fix="upgrade megatron_retro, or rebuild the artifact with this one",
        )
    return manifest


def load_manifest(artifact: Path) -> Manifest:
    """The manifest of any artifact, its own checksum verified."""
    recover_directory(artifact)
    path = manifest_path(artifact)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        known = {name: value for name, value in content.items() if name not in (_SEAL, "fingerprint")}
        manifest = Manifest(**{**known, "files": files})
    except FileNotFoundError:
        raise ArtifactError(
            f"{artifact} has no manifest: it is not ours or was never finished",
            expected=str(path),
            fix="run the command that builds it again",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArtifact(f"{path} is damaged", got=error, fix="rebuild the artifact") from None
    if text != manifest.to_json():
        raise DamagedArtifact(f"{path} was edited or damaged: its checksum does not match", fix="rebuild the artifact")
    return manifest


def damage(artifact: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files of an artifact, one sentence each; empty when it is intact."""
    root = artifact if artifact.is_dir() else artifact.parent
    problems = []
    for name, record in sorted(manifest.files.items()):
        path = root / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {record.bytes}")
        elif not unchanged(path, record):
            problems.append(f"{name} has changed since it was written (checksum)")
    if artifact.is_dir():
        files = (file for file in root.rglob("*") if file.is_file() and TEMPORARY_MARK not in file.name)
        present = {str(file.relative_to(root)) for file in files}  # a late worker's temporary file does no harm
        problems += [f"{name} does not belong here" for name in sorted(present - set(manifest.files) - {MANIFEST_NAME})]
    return problems


def require_same(artifact: Path, field_name: str, got: object, expected: object, rebuild: str) -> None:
    """Refuse an artifact made from something else, naming the field, both values and the command that rebuilds it."""
    if got != expected:
        raise ArtifactError(f"{artifact}: {field_name} does not match", got=got, expected=expected, fix=rebuild)
