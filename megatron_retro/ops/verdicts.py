"""What was found about the kernels on a kind of GPU, kept on disk: which is right, which is fastest, which serves.

A verdict belongs to a GPU's name, its driver, the compiled library and torch; another of any of them is another file.
The finding is done by `proof`, in processes of its own, so that a kernel that ends its process or hangs costs that
process alone. One process of a host proves, the others wait for its file and read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from megatron_retro.artifacts.files import make_folder, write_file
from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops import library
from megatron_retro.ops.backend_names import CUDA, FLOAT32, HALF, NATIVE, REFERENCE
from megatron_retro.runtime.console import say, warn
from megatron_retro.runtime.environment import processor_name
from megatron_retro.runtime.strict_json import from_plain, json_text, to_plain

PROVEN = (
    "layer_norm",
    "rms_norm",
    "residual_layer_norm",
    "residual_rms_norm",
    "rotary",
    "gated_activation",
    "gelu",
    "gelu_tanh",
    "squared_relu",
    "chunked_cross_attention",
    "linear_cross_entropy",
)
READY = "ready"
PROGRAM = (sys.executable, "-m", "megatron_retro.ops.proof")
LIMIT_SECONDS = 300.0
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Machine:
    """What a verdict holds for."""

    device: str
    name: str
    driver: str
    library: str
    torch: str


@dataclass(frozen=True)
class Finding:
    """One operator at one precision: who serves, what each took (forward and backward), and why another cannot."""

    serves: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The figures in one line."""
        times = ", ".join(f"{name} {value:.3g} ms" for name, value in self.milliseconds.items())
        parts = [f"proven here: {times}"] if times else []
        return "; ".join([*parts, *(f"{name} {problem}" for name, problem in self.problems.items())])


@dataclass(frozen=True)
class Verdict:
    """Findings by operator and precision."""

    machine: Machine
    findings: Mapping[str, Mapping[str, Finding]]

    def warnings(self) -> list[str]:
        """A sentence for each of our kernels that may not serve."""
        return [
            f"{operator}, {precision}: the {NATIVE} kernel {finding.problems[NATIVE]}; {finding.serves} serves"
            for operator, by_precision in self.findings.items()
            for precision, finding in by_precision.items()
            if NATIVE in finding.problems
        ]


@cache
def verdict_of(device: str) -> Verdict:
    """The verdict on this process's device of a type: read, or found now and kept."""
    machine = machine_of(device)
    path = verdict_path(machine)
    kept = read_verdict(path, machine)
    if kept is not None:
        return kept
    began = time.time()
    with _alone(path.with_suffix(".lock")):
        kept = read_verdict(path, machine) or _found_meanwhile(machine, path, began)
        return kept or _found_now(machine, path)


def machine_of(device: str) -> Machine:
    """What this process's device of a type is."""
    digest = hashlib.sha256(library.PATH.read_bytes()).hexdigest() if library.PATH.exists() else ""
    if device == CUDA:
        return Machine(device, torch.cuda.get_device_name(), _driver(), digest, torch.__version__)
    return Machine(device, processor_name(), "", digest, torch.__version__)


def _driver() -> str:
    """The kernel module's version line; torch's CUDA where the system does not show it."""
    try:
        return _DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return f"CUDA {torch.version.cuda}"


def verdict_path(machine: Machine) -> Path:
    """Its place under the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-retro" / "kernels"
    name = re.sub(r"\W+", "-", machine.name).strip("-")
    return folder / f"{name}-{_digest(to_plain(machine))[:12]}.json"


def read_verdict(path: Path, machine: Machine) -> Verdict | None:
    """What stands there; None where nothing does, or what is damaged or of another machine."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("digest") != _digest(content):
            return None
        verdict = from_plain(Verdict, content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    whole = all({FLOAT32, HALF} <= set(verdict.findings.get(operator, ())) for operator in PROVEN)
    return verdict if whole and verdict.machine == machine else None


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Keep it, whole or not at all."""
    content = to_plain(verdict)
    write_file(path, json_text({**content, "digest": _digest(content)}, indent=1) + "\n")


def prove(
    device: str, *, program: Sequence[str] = PROGRAM, limit: float = LIMIT_SECONDS
) -> tuple[Mapping[str, Mapping[str, Finding]], bool]:
    """Findings of all operators, and whether another try would find the same (not so where time or memory was short).

    A process proves one operator after the other and tells each. Where it ends before the last, the operator in work
    is the reason, and another process goes on behind it.
    """
    findings: dict[str, Mapping[str, Finding]] = {}
    deadline = time.monotonic() + limit
    while remaining := [operator for operator in PROVEN if operator not in findings]:
        found, ready, problem = _proving_process(program, device, remaining, deadline - time.monotonic())
        findings.update(found)
        blamed = next((operator for operator in remaining if operator not in found), None)
        if blamed is None:
            continue
        if ready and time.monotonic() < deadline:
            findings[blamed] = _unproven(f"{problem}, so it is taken for wrong")
            continue
        rest = _unproven(f"could not be proven: {problem}")
        return {**findings, **{operator: rest for operator in remaining if operator not in found}}, False
    return findings, True


def _unproven(problem: str) -> Mapping[str, Finding]:
    return {precision: Finding(REFERENCE, problems={NATIVE: problem}) for precision in (FLOAT32, HALF)}


def _proving_process(
    program: Sequence[str], device: str, operators: Sequence[str], seconds: float
) -> tuple[dict[str, Mapping[str, Finding]], bool, str]:
    """What a process told, whether it came as far as to begin, and how it ended."""
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as room:
        told = Path(room) / "told.jsonl"
        told.touch()
        command = (*program, str(told), device, *operators)
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=max(seconds, 1.0),
            )
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            problem = f"ended its process with {done.returncode} ({last})"
        except subprocess.TimeoutExpired:
            problem = f"did not end within {seconds:.0f} s"
        whole = told.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    found = {line["operator"]: from_plain(_Told, line).findings for line in lines if "operator" in line}
    return found, any(READY in line for line in lines), problem


@dataclass(frozen=True)
class _Told:
    operator: str
    findings: Mapping[str, Finding]


def _found_now(machine: Machine, path: Path) -> Verdict:
    say(f"proving kernels on {machine.name}: once for this GPU, driver, library and torch; a minute or two")
    place = f"cuda:{torch.cuda.current_device()}" if machine.device == CUDA else machine.device
    findings, lasting = prove(place)
    verdict = Verdict(machine, findings)
    for sentence in verdict.warnings():
        warn(sentence)
    try:
        write_verdict(path if lasting else _passing(path), verdict)
    except (EnvironmentProblem, OSError) as error:
        say(f"the verdict on kernels is not kept, so every process proves them again: {error}")
    return verdict


def _found_meanwhile(machine: Machine, path: Path, began: float) -> Verdict | None:
    """What a process found that this one waited for, though another try may find more; all would take too long."""
    try:
        fresh = _passing(path).stat().st_mtime >= began
    except FileNotFoundError:
        return None
    return read_verdict(_passing(path), machine) if fresh else None


def _passing(path: Path) -> Path:
    return path.with_suffix(".passing")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of a host at a time, where the file system has locks; elsewhere each proves for itself."""
    with suppress(EnvironmentProblem):
        make_folder(path.parent)
    try:
        stream = path.open("a")
    except OSError:
        yield
        return
    with stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _digest(content: object) -> str:
    return hashlib.sha256(json_text(content, sort_keys=True).encode()).hexdigest()
