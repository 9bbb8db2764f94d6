"""A function of tensors as one compiled graph, by torch.compile, whose failures are named.

What keeps no gradient (evaluation, generation) runs as it stands: lengths vary there, and each would be compiled for
itself. So do, in training, shapes beyond the first few.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops.backend_names import CUDA
from megatron_retro.runtime.console import warn

BACKEND = "inductor"
MOST_SHAPES = 6
_MOST_GRAPHS = 64  # of one function: kinds of layers, and what of them is frozen, times shapes
_FIX = (
    "go without: --no-compile (TORCHDYNAMO_VERBOSE=1 shows where in the code); where an earlier run was killed while "
    "it compiled, remove what it left in {}"
)


def compiler_problems(device: str) -> Sequence[str]:
    """Why torch.compile cannot serve on this type of device; empty where it can."""
    if device == CUDA and importlib.util.find_spec("triton") is None:
        return ("torch.compile needs triton on a GPU, which is not installed",)
    wanted, names = ("CC", ("gcc", "clang", "cc")) if device == CUDA else ("CXX", ("g++", "clang++"))
    found = os.environ.get(wanted) or next(filter(shutil.which, names), None)
    if found is None or shutil.which(found.split()[0]) is None:
        return (f"torch.compile needs a compiler ({' or '.join(names)}, or {wanted})",)
    return ()


class LayerCompiler:
    """Makes graphs of the functions of a model. Those of one code share them: layers of a kind are compiled once."""

    def __init__(self) -> None:
        import torch._dynamo as dynamo
        from torch._functorch import config as partition

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MOST_GRAPHS)
        # nonlinearities and norms are computed again, as eager layers do: else a third more is kept
        partition.ban_recompute_materialized_backward = False
        partition.force_non_lazy_backward_lowering = True  # so that its failures are met, and named, here too
        self._failures = (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit)
        self._shapes: set[torch.Size] = set()
        self._told = False

    def compiled(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The same function of tensors, the first of which tells all shapes; in training it runs as one graph.

        Before each call a graph's guards ask whether it still serves: about modules, contexts and tensors, but not
        about names of modules of code, which no run binds anew.
        """
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
        graph = torch.compile(plain, backend=BACKEND, fullgraph=True, dynamic=False, options=options)

        def run(first: Tensor, *others: Any) -> Any:
            if not torch.is_grad_enabled() or not self._has_graph(first.shape):
                return plain(first, *others)
            try:
                return graph(first, *others)
            except self._failures as error:
                raise EnvironmentProblem(
                    "a layer cannot be compiled as one graph",
                    got=_first_lines(error),
                    fix=_FIX.format(torch._inductor.runtime.cache_dir_utils.cache_dir()),
                ) from error

        return run

    def _has_graph(self, shape: torch.Size) -> bool:
        """Whether there is, or may still be made, a graph for a first tensor of this shape."""
        if shape in self._shapes:
            return True
        if len(self._shapes) < MOST_SHAPES:
            self._shapes.add(shape)
            return True
        if not self._told:
            self._told = True
            warn(f"layers were compiled for {len(self._shapes)} shapes of microbatches; those of others run eagerly")
        return False


def _first_lines(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
