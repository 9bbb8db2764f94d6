"""torch's flight recorder, read: which collective each rank came to, where some wait for others.

When a collective does not end in time, torch writes each rank's newest collectives into a file and ends the process.
The file is a pickle, which could run anything when torch's own tool loads it. Here it is read by a small machine that
knows numbers, texts and containers, and refuses every other instruction.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.errors import ArtifactError

FILE_START = "rank-"
_LARGEST = 256 << 20
_NUMBERS = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"))
_TEXTS = frozenset(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


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
        entries = plain_pickle(path.read_bytes())["entries"]
        return RankFlight(rank, tuple(_collective(entry) for entry in entries))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
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


def plain_pickle(data: bytes) -> Any:
    """The numbers, texts, lists, tuples and dictionaries of a pickle; anything else is a ValueError."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(data):
        name = code.name
        if name == "STOP":
            return stack.pop()
        if name in _NUMBERS or name in _TEXTS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME"):
            _build(name, stack)
    raise ValueError("the pickle has no end")


def _build(name: str, stack: list[Any]) -> None:
    """Open, fill or close a container on the stack."""
    if name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "APPEND":
        value = stack.pop()
        _top(stack, list).append(value)
    elif name == "APPENDS":
        values = _marked(stack)
        _top(stack, list).extend(values)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _top(stack, dict)[key] = value
    elif name == "SETITEMS":
        values = _marked(stack)
        _top(stack, dict).update(zip(values[::2], values[1::2], strict=True))
    elif name == "TUPLE":
        stack.append(tuple(_marked(stack)))
    elif name in _TUPLES:
        size = _TUPLES[name]
        stack[len(stack) - size :] = [tuple(stack[len(stack) - size :])]
    else:
        raise ValueError(f"an instruction that a record has no use for: {name}")


def _marked(stack: list[Any]) -> list[Any]:
    """Everything above the last mark, taken off with it."""
    values: list[Any] = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise ValueError(f"a {kind.__name__} is expected, there is a {type(stack[-1]).__name__}")
    return stack[-1]


def explained(flights: Sequence[RankFlight]) -> list[str]:
    """Lines for people."""
    return [f"collectives of {len(flights)} ranks when one of them did not end", *behind(flights)]
