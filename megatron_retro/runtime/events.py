"""The event log: one JSON object per line, appended, readable while it grows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_retro.runtime.strict_json import json_text


class EventLog:
    """Appends events to a file; without a path, forgets them."""

    def __init__(self, path: Path | None) -> None:
        self._stream = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(path)
            self._stream = path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, **facts: Any) -> None:
        if self._stream is not None:
            record = {"event": event, "time": round(time.time(), 3), **facts}
            self._stream.write(json_text(record) + "\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def read_events(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a log; a last line that was cut by a kill is passed over."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if not line.endswith("\n"):
                return
            record = json.loads(line)
            if event is None or record["event"] == event:
                yield record


def _drop_cut_line(path: Path) -> None:
    """Remove what a kill left of a last line, before the next event would be joined to it."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
            end -= 1
        stream.truncate(end)
