"""What one rank refuses, all ranks refuse in its words.

A rank that raises a named error leaves it in the store where the ranks met, and closes its connections. That ends the
collectives in which its peers wait for it; they find the error in the store and raise it as theirs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch._C._distributed_c10d import Store

from megatron_retro.errors import LostRank, MegatronRetroError, Requeue
from megatron_retro.runtime.store_calls import StoreCalls
from megatron_retro.runtime.strict_json import json_text

_REFUSAL, _LEFT = "refusals/first", "refusals/left"
_STORE_TIMEOUT = timedelta(seconds=3)
_LONGEST_WAIT = 10.0  # of the rank that keeps the store, for peers that have not read it yet
_LONGEST_CALL = 15.0  # that wait included, of a store whose process may be stopped
_POLL_SECONDS = 0.02


class Refusals:
    """The first refusal of a group of ranks."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def settle(self, error: Exception, close: Callable[[], None]) -> MegatronRetroError | None:
        """What this rank, which failed with `error`, should raise instead: what another one refused before it.

        `close` ends this rank's connections, on which its peers may wait.
        """
        if isinstance(error, Requeue):
            return None
        with suppress(RuntimeError):  # the store may be gone with its host
            return StoreCalls(_LONGEST_CALL)(lambda: self._settle(error, close))
        return None

    def _settle(self, error: Exception, close: Callable[[], None]) -> MegatronRetroError | None:
        self._store.set_timeout(_STORE_TIMEOUT)
        if isinstance(error, MegatronRetroError) and not isinstance(error, LostRank):
            mine = {"rank": self._rank, "words": str(error), "code": error.exit_code}
            self._store.compare_set(_REFUSAL, "", json_text(mine))
        known = self._store.check([_REFUSAL])
        first = json.loads(self._store.get(_REFUSAL)) if known else None
        close()
        self._store.add(_LEFT, 1)
        if known and self._rank == 0:
            self._wait_for_peers()
        if first is not None and first["rank"] != self._rank:
            refusal = MegatronRetroError(f"rank {first['rank']}: {first['words']}")
            refusal.exit_code = first["code"]
            return refusal
        return None

    def _wait_for_peers(self) -> None:
        deadline = time.monotonic() + _LONGEST_WAIT
        while self._store.add(_LEFT, 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
