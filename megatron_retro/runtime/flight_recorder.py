"""torch's flight recorder, read: which collective each rank came to, where some wait for others.

When a collective does not end in time, torch writes each rank's newest collectives into a file and ends the process.
The file is a pickle, which could run anything when torch's own tool loads it. Here only numbers, texts and containers
are read; every name is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.foreign_pickles import read_pickle

FILE_START = "rank-"
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Collective:
    """One collective of one rank: its group, its number there, and where in the code it was called."""

    group: str
    number: int
    name: str
    sizes: str
    state: str
    place: str


@dataclass(frozen=True)
class RankFlight:
    """What one rank recorded, oldest first."""

    rank: int
    collectives: tuple[Collective, ...]

    def newest(self) -> dict[str, Collective]:
        """The last collective of each group."""
        return {collective.group: collective for collective in self.collectives}


def read_flights(folder: Path) -> list[RankFlight]:
    """All ranks' files of a folder, in the order of the ranks."""
    found = []
    for path in folder.iterdir():
        number = re.fullmatch(rf"{FILE_START}(\d+)", path.name)
        if number is not None and path.is_file():
            found.append(read_flight(path, int(number[1])))
    return sorted(found, key=lambda flight: flight.rank)


def read_flight(path: Path, rank: int) -> RankFlight:
    """One rank's file."""
    size = path.stat().st_size
    if size > _LARGEST:
        raise ArtifactError(f"{path} is too large for a flight record", got=size, expected=f"at most {_LARGEST}")
    try:
        entries = read_pickle(path.read_bytes())["entries"]
        return RankFlight(rank, tuple(_collective(entry) for entry in entries))
    except (LookupError, TypeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"{path} is no flight record", got=repr(error)[:200]) from None


def _collective(entry: Mapping[str, Any]) -> Collective:
    name, description = entry["process_group"]
    frames = entry.get("frames") or []
    own = [frame for frame in frames if "/torch/" not in str(frame["filename"])]
    place = next((f"{frame['filename']}:{frame['line']} {frame['name']}" for frame in own), "")
    point_to_point = bool(entry.get("is_p2p"))
    number = int(entry["p2p_seq_id" if point_to_point else "collective_seq_id"])
    group = f"{description or name} (group {name}{', sends' if point_to_point else ''})"
    sizes = " ".join("x".join(map(str, size)) for size in entry.get("input_sizes") or [])
    state = "done" if entry.get("retired") else str(entry["state"])
    return Collective(group, number, str(entry["profiling_name"]), sizes, state, place)


def behind(flights: Sequence[RankFlight]) -> list[str]:
    """Sentences: in each group, what the foremost ranks wait in, and which ranks have not come there."""
    newest: dict[str, dict[int, Collective]] = {}
    for flight in flights:
        for group, collective in flight.newest().items():
            newest.setdefault(group, {})[flight.rank] = collective
    lines = []
    for group, by_rank in sorted(newest.items()):
        front = max(by_rank.values(), key=lambda collective: collective.number)
        late = {rank: last for rank, last in by_rank.items() if last.number < front.number}
        waiting = [rank for rank, last in by_rank.items() if last.number == front.number]
        where = f"{front.name} {front.sizes}".strip() + f", number {front.number} ({front.state})"
        if not late:
            lines.append(f"{group}: all {len(by_rank)} ranks came to {where}")
            continue
        lines.append(f"{group}: {_ranks(waiting)} wait in {where}, called at {front.place or 'an unknown place'}")
        for rank, last in sorted(late.items()):
            lines.append(
                f"  rank {rank} came only to {last.name}, number {last.number} ({last.state}), at {last.place}"
            )
    return lines


def _ranks(ranks: Sequence[int], shown: int = 8) -> str:
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:shown]))}{more}"


def explained(flights: Sequence[RankFlight]) -> list[str]:
    """Lines for people."""
    return [f"collectives of {len(flights)} ranks when one of them did not end", *behind(flights)]
