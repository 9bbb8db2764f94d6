"""What went wrong on any rank of a collective save or load, by its own name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_retro.artifacts.files import named_disk_errors
from megatron_retro.errors import MegatronRetroError


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Raise the first named error of any rank instead of torch's collection; full disks are named too."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for _, (failure, _) in sorted(error.failures.items())]
        ours = next((failure for failure in failures if isinstance(failure, MegatronRetroError)), None)
        if ours is not None:
            raise ours from None
        refused = next((failure for failure in failures if isinstance(failure, OSError)), None)
        if refused is not None:
            with named_disk_errors(path):
                raise refused from None
        raise failures[0] from error  # torch's collection is no `Exception`
