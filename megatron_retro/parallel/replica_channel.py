"""What the first rank of a replica tells the others: a few bytes at a time, in order, between hosts not devices.

For programs whose work is known to one rank only (prompts of clients, questions that are still open). Training needs
none of it: there every rank knows the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_retro.errors import DistributedError
from megatron_retro.parallel.mesh import DATA, TENSOR, ParallelMesh
from megatron_retro.runtime.process_group import new_group

# Waiting for work is no failure: a rank that dies closes its connections, and the others hear of it at once.
_TIMEOUT = timedelta(days=30)


class ReplicaChannel:
    """The ranks that hold one replica of the model together; made by all ranks of the mesh at once."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self._everyone = new_group(backend="gloo", timeout=_TIMEOUT)
        tensor, data = mesh.size(TENSOR), mesh.size(DATA)
        ranks = range(dist.get_world_size())
        for replica in range(data):
            members = [rank for rank in ranks if rank // tensor % data == replica]
            group = new_group(members, backend="gloo", timeout=_TIMEOUT)
            if mesh.rank(DATA) == replica:
                self._group, self._first = group, members[0]
        self.is_first = dist.get_rank() == self._first

    def broadcast(self, data: bytes = b"") -> bytes:
        """What the first rank gives; all ranks of the replica call it. Nothing at all is the cheapest to say."""
        with _named():
            length = torch.tensor([len(data)])
            dist.broadcast(length, self._first, group=self._group)
            if not int(length):
                return b""
            content = torch.frombuffer(bytearray(data if self.is_first else bytes(int(length))), dtype=torch.uint8)
            dist.broadcast(content, self._first, group=self._group)
            return content.numpy().tobytes()

    def barrier(self) -> None:
        """Until all ranks of all replicas are done: the process group lives in the first one's process."""
        with _named():
            dist.barrier(self._everyone)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            "another process of this job is gone",
            got=str(error).splitlines()[0],
            expected="every rank to stay until the work is done",
            fix="look for the first rank that ended; then start the job again: it goes on where it was",
        ) from error
