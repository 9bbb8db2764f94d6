"""One microbatch, one type: NumPy arrays as a loader reads it, tensors as a model computes on it.

Letters: B samples, S tokens of a sample, C chunks, K neighbours, R retrieved length.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_retro.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = NDArray[Any]
ArrayT = TypeVar("ArrayT", Array, "Tensor")


_MOST_DOCUMENTS = 64  # of a row that kernels are told where each begins; a mask serves where there are more
_BOUNDS = "document_bounds_BD"


def label_checksum(labels: Array) -> int:
    """Of what a sample predicts: two measurements can be paired where theirs agree."""
    return zlib.crc32(labels.astype("<i4").tobytes())


def document_bounds(ids_BS: Array) -> Array | None:
    """[B, D + 1] where each document of a row begins, and at last where the row ends; None if a row has too many.

    Every row has the same number of bounds, whatever its documents: missing ones are empty and stand at its end.
    """
    starts_BS = np.diff(ids_BS, axis=1, prepend=ids_BS[:, :1] - 1) != 0
    counts = starts_BS.sum(1)
    if counts.max(initial=0) > _MOST_DOCUMENTS:
        return None
    bounds_BD = np.full((len(ids_BS), _MOST_DOCUMENTS + 1), ids_BS.shape[1], np.int64)
    rows, places = np.nonzero(starts_BS)
    bounds_BD[rows, np.concatenate([np.arange(count) for count in counts])] = places
    return bounds_BD


@dataclass(frozen=True)
class Neighbors(Generic[ArrayT]):
    """What was retrieved for the chunks of a batch; the mask is True where a token exists.

    An absent neighbour is all False; its tokens are never read. Where this is a part of each sequence in P spans,
    `mask_before_BPKR` is the mask of the chunk before each, absent before the first chunk of all.
    """

    tokens_BCKR: ArrayT
    mask_BCKR: ArrayT
    mask_before_BPKR: ArrayT | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks that have an entry."""
        return int(self.tokens_BCKR.shape[1])

    @property
    def is_empty(self) -> bool:
        """True when there is no chunk, no neighbour or no token at all."""
        return 0 in self.tokens_BCKR.shape

    def first_chunks(self, count: int) -> Neighbors[ArrayT]:
        """The entries of the first `count` chunks."""
        if self.num_chunks < count:
            raise ValueError(f"{count} chunks are complete, but neighbours are given for {self.num_chunks}")
        return Neighbors(self.tokens_BCKR[:, :count], self.mask_BCKR[:, :count], self.mask_before_BPKR)

    def mask_of_spans(self: Neighbors[Tensor]) -> Tensor:
        """[B * P, 1 + C / P, K, R]: the masks of each span behind the one before it."""
        import torch

        if self.mask_before_BPKR is None:
            raise ValueError("these neighbours are of whole sequences")
        spans = torch.unflatten(self.mask_BCKR, 1, (self.mask_before_BPKR.shape[1], -1))
        return torch.cat((self.mask_before_BPKR[:, :, None], spans), 2).flatten(0, 1)


@dataclass(frozen=True)
class Microbatch(Generic[ArrayT]):
    """Tokens, what they predict, and what was retrieved for them; None for what a run does without.

    Where ranks share sequences, a rank's has its part of each, and of documents the ids of the whole sequence.
    `document_ids_BS` counts the documents of a sample from 0; on a GPU `document_bounds_BD` says where each begins.
    `sample_ids_B`, numbers of the global order, stay on the host.
    """

    tokens_BS: ArrayT
    labels_BS: ArrayT
    loss_mask_BS: ArrayT
    position_ids_BS: ArrayT | None = None
    document_ids_BS: ArrayT | None = None
    neighbors: Neighbors[ArrayT] | None = None
    sample_ids_B: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    document_bounds_BD: ArrayT | None = None
    _copies: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        return int(self.tokens_BS.shape[0])

    def arrays(self) -> dict[str, ArrayT]:
        """What there is but the ids of the samples, by name."""
        found = {
            "tokens_BS": self.tokens_BS,
            "labels_BS": self.labels_BS,
            "loss_mask_BS": self.loss_mask_BS,
            "position_ids_BS": self.position_ids_BS,
            "document_ids_BS": self.document_ids_BS,
            _BOUNDS: self.document_bounds_BD,
            "neighbor_tokens_BCKR": None if self.neighbors is None else self.neighbors.tokens_BCKR,
            "neighbor_mask_BCKR": None if self.neighbors is None else self.neighbors.mask_BCKR,
            "neighbor_mask_before_BPKR": None if self.neighbors is None else self.neighbors.mask_before_BPKR,
        }
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def of_arrays(
        cls, arrays: Mapping[str, ArrayT], sample_ids_B: NDArray[np.int64] | None = None
    ) -> Microbatch[ArrayT]:
        """The inverse of `arrays`."""
        plain = {name: array for name, array in arrays.items() if not name.startswith("neighbor_")}
        neighbors = None
        if "neighbor_tokens_BCKR" in arrays:
            before = arrays.get("neighbor_mask_before_BPKR")
            neighbors = Neighbors(arrays["neighbor_tokens_BCKR"], arrays["neighbor_mask_BCKR"], before)
        ids = np.empty(0, np.int64) if sample_ids_B is None else sample_ids_B
        return cls(**plain, neighbors=neighbors, sample_ids_B=ids)

    @classmethod
    def joined(
        cls,
        batches: Sequence[Microbatch[ArrayT]],
        concatenate: Callable[[Sequence[ArrayT]], ArrayT],
        *,
        same_size: bool = False,
    ) -> Microbatch[ArrayT]:
        """The samples of several microbatches as one; `same_size` asks for as many samples in each."""
        all_arrays = [batch.arrays() for batch in batches]
        joined = {}
        for name in dict.fromkeys(name for arrays in all_arrays for name in arrays):
            present = [arrays[name] for arrays in all_arrays if name in arrays]
            shapes = {tuple(array.shape[0 if same_size else 1 :]) for array in present}
            if name == _BOUNDS and len(present) != len(batches):
                continue  # the ids say the same
            if len(present) != len(batches) or len(shapes) != 1:
                raise DataError(
                    f"microbatches cannot be joined, their {name} differ",
                    got=", ".join(map(str, sorted(shapes))) + f"; {len(batches) - len(present)} without",
                    expected="the same shape in every microbatch",
                    fix="mark absent neighbours in the mask; drop or pad a short last batch",
                )
            joined[name] = concatenate(present)
        return cls.of_arrays(joined, np.concatenate([batch.sample_ids_B for batch in batches]))

    def copy_ahead(self: Microbatch[Array], device: torch.device) -> None:
        """Begin the copy to a GPU in the thread that reads, so that `to` finds it done; nothing is done for a CPU."""
        import torch

        if device.type != "cpu":
            # a thread's own GPU is the first one, whose memory would be pinned
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                self._copies[device] = self.to(device)

    def to(self: Microbatch[Array], device: torch.device) -> Microbatch[Tensor]:
        """On a device, ids as int64. A GPU copies from pinned memory, while the host goes on."""
        import torch

        if device in self._copies:
            copied: Microbatch[Tensor] = self._copies[device]
            return copied

        def moved(array: Array) -> Tensor:
            is_mask = array.dtype == np.bool_
            tensor = torch.from_numpy(np.ascontiguousarray(array) if is_mask else array.astype(np.int64))
            # torch keeps the pinned memory until the copy is done
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
            return tensor.to(device, non_blocking=True)

        arrays = self.arrays()
        bounds = None if self.document_ids_BS is None or device.type == "cpu" else document_bounds(self.document_ids_BS)
        if bounds is not None:
            arrays[_BOUNDS] = bounds
        return Microbatch.of_arrays({name: moved(array) for name, array in arrays.items()}, self.sample_ids_B)

    def counted_labels(self: Microbatch[Tensor]) -> Tensor:
        """[B, S] labels, -1 where a position does not count: that costs a loss no work."""
        return self.labels_BS.where(self.loss_mask_BS > 0, -1)
