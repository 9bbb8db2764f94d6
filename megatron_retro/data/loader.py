"""The loader: the global order of samples, cut into steps, ranks and micro-batches, prepared ahead by threads.

Step by step the next `global_batch_size` samples of the order are consumed; data-parallel rank r of R reads the r-th
contiguous share of them, in micro-batches. The order is the same for any R, and a state is only a number of samples,
so a run resumes exactly with any other R.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.verified import Verification
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.runtime.standstill import Standstill

if TYPE_CHECKING:
    import torch

_STEPS_AHEAD = 2


class Samples(Protocol):
    """What a loader reads: samples by their number in the order of the run."""

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the k-th sample depends on."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of what the samples are made of."""
        ...

    def read(self, numbers: Sequence[int]) -> Microbatch[Array]:
        """The samples of these numbers."""
        ...

    def documents(self, numbers: Sequence[int]) -> NDArray[np.int64] | None:
        """The document that each sample is of; None where a sample is of no document or of its own."""
        ...


class Loader:
    """Iterates over steps; each is the list of this rank's micro-batches.

    Threads read ahead, and begin the copies to a GPU, if that is the `device`. Where ranks share sequences, `own_part`
    is this rank's of a micro-batch.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        micro_batch_size: int,
        global_batch_size: int | Callable[[int], int],
        data_rank: int = 0,
        data_size: int = 1,
        num_threads: int = 0,
        verification: Verification | None = None,
        device: torch.device | None = None,
        own_part: Callable[[Microbatch[Array]], Microbatch[Array]] | None = None,
    ) -> None:
        self.dataset, self.micro_batch_size = dataset, micro_batch_size
        self.data_rank, self.data_size = data_rank, data_size
        self._batch_size = global_batch_size
        self._num_threads, self._verification, self._device = num_threads, verification, device
        self._own_part = own_part
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loader") if num_threads else None
        self._ahead: deque[tuple[int, Future[list[Microbatch[Array]]]]] = deque()
        self.consumed_samples = 0
        self.standstill: Standstill | None = None

    def global_batch_size(self, consumed_samples: int) -> int:
        """Samples of the step that begins after so many."""
        size = self._batch_size if isinstance(self._batch_size, int) else self._batch_size(consumed_samples)
        unit = self.micro_batch_size * self.data_size
        if size < 1 or size % unit:
            raise ConfigError(
                "--global-batch-size is not a multiple of micro-batch size x data-parallel ranks",
                got=f"{size} after {consumed_samples} samples",
                expected=f"a multiple of {self.micro_batch_size} x {self.data_size}",
            )
        return size

    def __iter__(self) -> Iterator[list[Microbatch[Array]]]:
        return self

    def __next__(self) -> list[Microbatch[Array]]:
        if self._verification is not None:
            self._verification.require_sound()
        size = self.global_batch_size(self.consumed_samples)
        with self._bounded(f"samples {self.consumed_samples} to {self.consumed_samples + size - 1}"):
            step = self._next_prepared() if self._pool else self._read_own(self.consumed_samples, size)
        self.consumed_samples += size
        return step

    def _next_prepared(self) -> list[Microbatch[Array]]:
        position = self._ahead[-1][0] if self._ahead else self.consumed_samples
        while len(self._ahead) < _STEPS_AHEAD + self._num_threads:
            size = self.global_batch_size(position)
            future = self._require_pool().submit(self._read_ahead, position, size)
            position += size
            self._ahead.append((position, future))
        return self._ahead.popleft()[1].result()

    def _require_pool(self) -> ThreadPoolExecutor:
        if self._pool is None:
            raise ValueError("this loader has no threads")
        return self._pool

    def _read_ahead(self, position: int, size: int) -> list[Microbatch[Array]]:
        step = self._read_own(position, size)
        if self._device is not None:
            for batch in step:
                batch.copy_ahead(self._device)
        return step

    def _read_own(self, position: int, size: int) -> list[Microbatch[Array]]:
        step = self._read_step(position, size)
        return step if self._own_part is None else [self._own_part(batch) for batch in step]

    def _read_step(self, position: int, size: int) -> list[Microbatch[Array]]:
        share = size // self.data_size
        first = position + share * self.data_rank
        return [
            self.dataset.read(range(start, start + self.micro_batch_size))
            for start in range(first, first + share, self.micro_batch_size)
        ]

    def first(self, steps: int) -> list[Microbatch[Array]]:
        """The micro-batches of the first steps of the order, in whole sequences, whatever was read; its place there
        stays."""
        starts = [0]
        while len(starts) < steps:
            starts.append(starts[-1] + self.global_batch_size(starts[-1]))
        starts = starts[:steps]
        read = self._pool.map if self._pool else map
        with self._bounded(f"the first {steps} steps"):
            found = read(self._read_step, starts, map(self.global_batch_size, starts))
            return [batch for step in found for batch in step]

    def _bounded(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self.standstill is None else self.standstill.bounded(what)

    def state(self) -> dict[str, Any]:
        """Where the order stands; what was read ahead but not handed out does not count."""
        return {"consumed_samples": self.consumed_samples, "order": self.dataset.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state, of any number of ranks."""
        if state["order"] != self.dataset.fingerprint:
            raise ArtifactError(
                "the saved position belongs to another order of samples",
                got=state["order"][:16],
                expected=self.dataset.fingerprint[:16],
                fix="the data, the seed, the sequence length or the blend changed: restore them, or start "
                "the order again without the saved position",
            )
        self.seek(int(state["consumed_samples"]))

    def seek(self, consumed_samples: int) -> None:
        """Go to any place of the order."""
        self._drop_ahead()
        self.consumed_samples = consumed_samples

    def _drop_ahead(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        self._drop_ahead()
        if self._verification is not None:
            self._verification.close()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
