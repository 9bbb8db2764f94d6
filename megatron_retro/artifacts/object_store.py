"""Objects behind URLs (S3, GCS, HTTP: whatever fsspec knows), read in ranges, with patience.

fsspec is imported when a URL is given, not before. A server that fails for a moment is asked again; one that stays
away is an error that names the object.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_retro.errors import ArtifactError, DamagedArtifact, EnvironmentProblem

PARALLEL_READS = 16
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between one attempt and the next
_FACTS = ("size", "ETag", "etag", "generation", "LastModified", "Last-Modified", "updated", "mtime", "created", "ino")
_NEEDED = "pip install 'megatron-retro[object-stores]', with s3fs for s3:// and gcsfs for gs://"


def is_url(path: str | Path) -> bool:
    """Whether a path is one of an object store."""
    return "://" in str(path)


class ObjectStore:
    """The store that a URL lies in. Threads may share it."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._files: Any = url_to_fs(url, use_listings_cache=False)[0]
        except (ImportError, ValueError) as error:
            raise EnvironmentProblem(f"{url} cannot be read on this machine", got=error, fix=_NEEDED) from None

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that read beside one another."""
        return ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="object-store")

    def read(self, url: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an object."""
        if start == stop:
            return b""
        content: bytes = self._asked(url, lambda: self._files.cat_file(url, start=start, end=stop))
        if len(content) != stop - start:
            raise DamagedArtifact(
                f"{url} is cut, or its server gives no ranges",
                got=f"{len(content)} bytes",
                expected=f"{stop - start}, from byte {start} on",
                fix="write the object again, or ask for a server that answers range requests",
            )
        return content

    def read_ranges(self, url: str, ranges: Sequence[slice]) -> list[bytes]:
        """Several parts of an object at once."""
        return list(self.pool.map(lambda one: self.read(url, one.start, one.stop), ranges))

    def read_if_there(self, url: str) -> bytes | None:
        """A small object, or None where there is none."""
        content: bytes | None = self._asked(url, lambda: self._files.cat_file(url), missing=True)
        return content

    def size_and_state(self, url: str) -> tuple[int, str]:
        """Bytes of an object, and what changes when it is written again, as far as the store tells."""
        facts = self._asked(url, lambda: self._files.info(url))
        told = str([(name, str(facts[name])) for name in _FACTS if name in facts])
        if facts.get("size") is None:
            raise ArtifactError(f"the server of {url} does not say how large it is", fix="copy it to a disk")
        return int(facts["size"]), hashlib.sha256(told.encode()).hexdigest()

    def _asked(self, url: str, ask: Callable[[], Any], *, missing: bool = False) -> Any:
        for pause in (*_PAUSES, None):
            try:
                return ask()
            except FileNotFoundError:
                if missing:
                    return None
                raise ArtifactError(f"there is no object {url}", fix="give the URL without .bin and .idx") from None
            except PermissionError as error:
                raise EnvironmentProblem(
                    f"{url} may not be read", got=error, fix="give this process the rights"
                ) from None
            except Exception as error:  # each store has its own for the same thing
                if pause is None:
                    raise EnvironmentProblem(
                        f"{url} cannot be read: its server fails",
                        got=f"{type(error).__name__}: {error}",
                        fix=f"it was asked {1 + len(_PAUSES)} times; when it answers again, run the same command again",
                    ) from None
                time.sleep(pause * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")
