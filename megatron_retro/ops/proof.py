"""The proof of the kernels, as a program of its own: which are right on this device, and how fast each is.

    python -m megatron_retro.ops.proof TOLD DEVICE OPERATOR...

It adds one line to the file TOLD for each operator; `verdicts` starts it, reads the lines and decides nothing else.
Right means: never more than twice the error of the reference at the same precision, both against float64, forward and
backward. The reference is the truth and serves unless something that is right is faster by more than chance.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from megatron_retro.ops.backend_names import COMPILED, FLOAT32, HALF, NATIVE, REFERENCE
from megatron_retro.ops.backends import VARIABLE, backends_of
from megatron_retro.ops.precision import Formula, comparisons
from megatron_retro.ops.proof_cases import Case, Grid
from megatron_retro.ops.verdicts import PROVEN, READY, Finding
from megatron_retro.runtime.strict_json import json_text, to_plain

# float16 is proven beside bfloat16 and not timed: models train in bfloat16.
PRECISIONS: Mapping[str, Sequence[torch.dtype]] = {
    FLOAT32: (torch.float32,),
    HALF: (torch.bfloat16, torch.float16),
}
FASTER = 0.97  # of the reference's time: less is chance
_ROUNDS = 7


def main(told: Path, device: torch.device, operators: Sequence[str]) -> None:
    """Prove operators one after the other. Whatever one raises ends the process: a device may be lost with it."""
    torch.zeros(1, device=device)
    _tell(told, {READY: True})
    for operator in operators:
        findings = {precision: finding(operator, precision, device) for precision in PRECISIONS}
        _tell(told, {"operator": operator, "findings": to_plain(findings)})


def finding(operator: str, precision: str, device: torch.device) -> Finding:
    """Compare and time what can serve an operator."""
    problems: dict[str, str] = {}
    right = [REFERENCE]
    for backend in (NATIVE, COMPILED):
        if backend not in backends_of(operator) or (backend == COMPILED and precision == FLOAT32):
            continue  # a model in float32 is a check, not worth a compilation
        problem = wrong(operator, backend, precision, device)
        if problem is None:
            right.append(backend)
        else:
            problems[backend] = problem
    case = Grid(PRECISIONS[precision][0], device).timed(operator)
    times = milliseconds({backend: serving(operator, backend, case.face) for backend in right}, case, device)
    fastest = min(times, key=times.__getitem__)
    serves = fastest if times[fastest] < FASTER * times[REFERENCE] else REFERENCE
    return Finding(serves, times, problems)


def wrong(operator: str, backend: str, precision: str, device: torch.device) -> str | None:
    """What is wrong with a backend, with the numbers; None where it is right on the grid.

    Two cases are enough of what a compiler makes: more are many compilations of the same lines.
    """
    few = backend == COMPILED
    torch._dynamo.reset()
    for dtype in PRECISIONS[precision][: 1 if few else None]:
        for case in islice(Grid(dtype, device).proven(operator), 2 if few else None):
            plain = case.formula or serving(operator, REFERENCE, case.face)
            try:
                found = comparisons(serving(operator, backend, case.face), plain, case.inputs)
            except Exception as error:
                if backend == NATIVE:
                    raise
                _wait(device)  # raises if the device is lost with it
                return f"does not run: {(str(error).splitlines() or [type(error).__name__])[0]}"
            worst = max(found, key=lambda each: each.excess)
            if not worst.excess <= 0.0:
                shapes = " and ".join("x".join(map(str, each.shape)) for each in case.inputs if each is not None)
                name = str(dtype).removeprefix("torch.")
                return f"is wrong: error {worst.error:.2e}, allowed {worst.allowed:.2e} ({name}, {shapes})"
    return None


def serving(operator: str, backend: str, face: Formula) -> Formula:
    """The face with one backend for its operator and the references for all others."""
    wish = ",".join(f"{each}={backend if each == operator else REFERENCE}" for each in PROVEN)

    def call(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        os.environ[VARIABLE] = wish  # stays: the backward pass, in a thread of its own, asks again
        return face(*inputs)

    return call


def milliseconds(faces: Mapping[str, Formula], case: Case, device: torch.device) -> dict[str, float]:
    """Medians of forward and backward, in turn, so that a busy machine hurts all alike."""
    taken: dict[str, list[float]] = {name: [] for name in faces}
    leaves = [each for each in case.inputs if each is not None and each.requires_grad]
    directions: list[torch.Tensor] = []
    for turn in range(_ROUNDS + 1):
        for name, face in faces.items():
            _wait(device)
            began = time.perf_counter()
            outputs = face(*case.inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            directions = directions or [torch.ones_like(each) for each in outputs]
            torch.autograd.grad(outputs, leaves, directions)
            _wait(device)
            if turn:
                taken[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tell(told: Path, line: Mapping[str, object]) -> None:
    with told.open("a", encoding="utf-8") as stream:
        stream.write(json_text(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.device(sys.argv[2]), sys.argv[3:])
