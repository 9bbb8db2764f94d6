"""What we add to `torch.distributed.checkpoint`: planners that leave out padding, and failures by their own names.

A checkpoint stores the true vocabulary, not the rows that pad it for a cut, so it loads on a layout that pads
differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megatron_retro.artifacts.files import named_disk_errors
from megatron_retro.errors import MegatronRetroError


class TrimmingSavePlanner(DefaultSavePlanner):
    """Saves the first `true_rows[name]` rows of the named tensors."""

    def __init__(self, true_rows: Mapping[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._true_rows = true_rows

    def create_local_plan(self) -> SavePlan:
        """The default plan without padding and without empty pieces."""
        plan = super().create_local_plan()
        items = [trimmed for item in plan.items if (trimmed := self._trimmed(item)) is not None]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def _trimmed(self, item: WriteItem) -> WriteItem | None:
        data = item.tensor_data
        if data is None:
            return item
        rows = self._true_rows.get(item.index.fqn)
        if rows is not None:
            offsets, sizes = list(data.chunk.offsets), list(data.chunk.sizes)
            sizes[0] = max(0, min(sizes[0], rows - offsets[0]))
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            data = dataclasses.replace(data, chunk=chunk, size=torch.Size([rows, *data.size[1:]]))
        is_empty = 0 in data.chunk.sizes and 0 not in data.size
        return None if is_empty else dataclasses.replace(item, tensor_data=data)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Cut a tensor to the rows that the plan names."""
        data = write_item.tensor_data
        if isinstance(object, Tensor) and data is not None and object.ndim:
            return object[: data.chunk.sizes[0]]
        return super().transform_object(write_item, object)


class PaddingLoadPlanner(DefaultLoadPlanner):
    """Loads the true rows of the named tensors; padding rows become zero."""

    def __init__(self, true_rows: Mapping[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._true_rows = true_rows

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the sizes of padded tensors from the tensors themselves."""
        if metadata is not None:
            entries = dict(metadata.state_dict_metadata)
            for name in self._true_rows.keys() & entries.keys() & state_dict.keys():
                entry = entries[name]
                if isinstance(entry, TensorStorageMetadata):
                    entries[name] = dataclasses.replace(entry, size=state_dict[name].size())
                state_dict[name].detach().zero_()
            metadata = dataclasses.replace(metadata, state_dict_metadata=entries)
        super().set_up_planner(state_dict, metadata, is_coordinator)


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
