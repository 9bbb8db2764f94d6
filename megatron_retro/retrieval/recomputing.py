"""`--retro-task-validate`: a share of finished blocks is computed again and compared, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval.training import uniform_sample
from megatron_retro.runtime.console import Progress


def recompute(what: str, files: Sequence[Path], share: float, write: Callable[[int, Path], None]) -> None:
    """Write a share of `files` again elsewhere (`write(number, path)`) and refuse the first that differs."""
    if share <= 0 or not files:
        return
    chosen = uniform_sample(len(files), max(1, round(share * len(files))))
    with (
        TemporaryDirectory(prefix="again-", dir=files[0].parent.parent) as folder,
        Progress(f"{what}: computing again", len(chosen), "blocks") as progress,
    ):
        for number in chosen.tolist():
            if not files[number].exists():
                continue  # published by another worker, who computed a share again before
            path = Path(folder) / files[number].name
            write(number, path)
            if path.read_bytes() != files[number].read_bytes():
                raise ArtifactError(
                    f"{files[number]} is not what its inputs give",
                    fix="remove it and run the same command again; if it happens again, a machine computes wrongly",
                )
            path.unlink()
            progress.advance(1)
