"""Worker processes of this machine: each tokenizes blocks that it claims, and is replaced when it dies.

The claim of a dead process is free, so another worker takes its block; a block that kills three workers ends the run
with its byte range named. An error that a worker reports ends the run with that error.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_retro.errors import EnvironmentProblem, MegatronRetroError, Requeue
from megatron_retro.runtime.console import warn
from megatron_retro.runtime.signals import StopRequests, die_with_parent, stopped_between_blocks

MOST_DEATHS_PER_BLOCK = 3
_LONGEST_SILENCE = 0.5  # seconds without a look at whether to stop
Send = Callable[[str, Any], None]


@dataclass
class _Member:
    process: BaseProcess
    channel: Connection
    block: int | None = None
    number: int = 0


@dataclass
class WorkerPool:
    """Runs `work(number, send)` in processes until each returns.

    `work` sends ("block", n) when it begins a block and ("progress", facts) as it goes.
    """

    size: int
    work: Callable[[int, Send], None]
    on_progress: Callable[[Any], None]
    describe: Callable[[int], str]
    _deaths: dict[int | None, int] = field(default_factory=dict)
    _stopping: bool = False
    _stopped: Requeue | None = None

    def run(self) -> None:
        """Start workers and replace dead ones; returns when all blocks that can be claimed are done.

        A signal that asks to stop is handed to the workers, and `Requeue` raised when their blocks are finished.
        """
        with StopRequests().listening() as stops:
            members = [self._start(number) for number in range(self.size)]
            try:
                while members:
                    members = self._after_messages(members)
                    if stops.reason() is not None:
                        self._stopping = True
                        for member in members:  # every time: one that has just begun does not listen yet
                            member.process.terminate()
            finally:
                for member in members:
                    member.process.kill()
                    member.process.join()
            if self._stopping or self._stopped is not None:
                raise self._stopped or stopped_between_blocks(stops)

    def _after_messages(self, members: list[_Member]) -> list[_Member]:
        """The members that go on after a word of any of them, or after a while."""
        channels = [member.channel for member in members]
        ready = wait([*channels, *(member.process.sentinel for member in members)], _LONGEST_SILENCE)
        left: list[_Member] = []
        for number, member in enumerate(members):
            heard = member.channel in ready or member.process.sentinel in ready
            try:
                left += self._read_messages(member) if heard else [member]
            except BaseException:
                members[:number] = left
                raise
        return left

    def _start(self, number: int) -> _Member:
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(self.work, number, sending), daemon=True)
        process.start()
        sending.close()
        return _Member(process, receiving, number=number)

    def _read_messages(self, member: _Member) -> list[_Member]:
        """Read a worker's messages; returns the workers that go on in its place."""
        try:
            while member.channel.poll():
                kind, content = member.channel.recv()
                if kind == "error" and isinstance(content, Requeue):
                    self._stopped = content
                    kind = "done"
                if kind == "error":
                    raise content
                if kind == "done":
                    member.process.join()
                    return []
                if kind == "block":
                    member.block = content
                else:
                    self.on_progress(content)
        except EOFError:
            member.process.join()
            return [] if self._stopping else [self._replace(member)]
        return [member]

    def _replace(self, member: _Member) -> _Member:
        code = member.process.exitcode or 0
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        deaths = self._deaths[member.block] = self._deaths.get(member.block, 0) + 1
        at_work = "before its first block" if member.block is None else "in " + self.describe(member.block)
        if deaths >= MOST_DEATHS_PER_BLOCK:
            raise EnvironmentProblem(
                f"a worker {how} {at_work}, {deaths} times in a row",
                fix="signal 9 is often the system running out of memory: give fewer --workers or a smaller "
                "--max-document-bytes; the same command goes on",
            )
        warn(f"worker {member.number} {how} {at_work}; another one does that part again")
        return self._start(member.number)


def _main(work: Callable[[int, Send], None], number: int, channel: Connection) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()

    def send(kind: str, content: Any) -> None:
        channel.send((kind, content))

    try:
        work(number, send)
        send("done", None)
    except MegatronRetroError as error:
        send("error", error)
    except BrokenPipeError:
        os._exit(1)
    except BaseException as error:
        error.add_note("in a worker process") if hasattr(error, "add_note") else None
        send("error", error)
