"""Kernels prove themselves: what is wrong or slow does not serve, and a verdict holds where it was found."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.ops import backends, library, proof, verdicts
from megatron_retro.ops.agreement import settle_kernels
from megatron_retro.ops.backend_names import COMPILED, FLOAT32, FLOAT64, HALF, NATIVE, REFERENCE
from megatron_retro.ops.backends import VARIABLE
from megatron_retro.ops.verdicts import PROVEN, Finding, Machine, Verdict
from megatron_retro.testing.processes import run_ranks

CPU = torch.device("cpu")
COMPILED_CSRC = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
MACHINE = Machine("cuda", "GPU of a test", "1.0", "abc", "2.0")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache folder of the test's own; choices and verdicts are kept per process and must not stay."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "auto")
    kept = (backends._decided, verdicts.verdict_of, backends._compiled)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


class Planted:
    """Our operators, one of them changed."""

    def __init__(self, name: str, change: Callable[..., Any]) -> None:
        self._ops, self._name, self._change = torch.ops.megatron_retro, name, change

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._ops, name)
        return (lambda *inputs: self._change(operator(*inputs))) if name == self._name else operator


def plant(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    monkeypatch.setattr(torch.ops, "megatron_retro", Planted(name, change))


@COMPILED_CSRC
@pytest.mark.parametrize("operator", PROVEN)
def test_our_kernels_are_right_on_the_grid(operator: str) -> None:
    for precision in (FLOAT32, HALF):
        assert proof.wrong(operator, NATIVE, precision, CPU) is None


def doubled_gradient(value: Tensor) -> Tensor:
    return 2 * value - value.detach()


def slightly_off(value: Tensor) -> Tensor:
    return value * 1.05


def not_a_number_at_odd_sizes(value: Tensor) -> Tensor:
    return value * float("nan") if value.shape[-1] % 2 else value


@COMPILED_CSRC
@pytest.mark.parametrize("change", [doubled_gradient, slightly_off, not_a_number_at_odd_sizes])
def test_a_wrong_kernel_is_found_and_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]
) -> None:
    plant(monkeypatch, "gated_activation", change)
    for precision in (FLOAT32, HALF):
        found = proof.finding("gated_activation", precision, CPU) if precision == FLOAT32 else None
        problem = proof.wrong("gated_activation", NATIVE, precision, CPU)
        assert problem is not None and problem.startswith("is wrong: error ") and "allowed" in problem
        if found is not None:
            assert found.serves == REFERENCE and NATIVE not in found.milliseconds
            assert found.problems == {NATIVE: problem}


@COMPILED_CSRC
def test_the_faster_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right kernel that is slower than the reference does not serve; one that is faster does."""

    def slow(value: Any) -> Any:
        time.sleep(0.05)
        return value

    with monkeypatch.context() as patched:
        plant(patched, "rotary", slow)
        found = proof.finding("rotary", FLOAT32, CPU)
        assert found.serves == REFERENCE and found.milliseconds[NATIVE] > 50
    reference = proof.serving

    def slow_reference(operator: str, backend: str, face: Callable[..., Any]) -> Callable[..., Any]:
        call = reference(operator, backend, face)
        return (lambda *inputs: slow(call(*inputs))) if backend == REFERENCE else call

    monkeypatch.setattr(proof, "serving", slow_reference)
    assert proof.finding("rotary", FLOAT32, CPU).serves == NATIVE


@COMPILED_CSRC
def test_the_compiler_is_told_what_is_constant_as_torch_tells_it() -> None:
    def of_torch() -> None: ...

    torch.compiler.assume_constant_result(of_torch)
    assert vars(of_torch) == vars(backends.constant_when_compiled(lambda: None)) != {}
    assert vars(of_torch).items() <= vars(backends.uses_native).items()


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda formula: fail)
    found = proof.finding("squared_relu", HALF, CPU)
    assert found.problems == {COMPILED: "does not run: no compiler here"}
    backends._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda formula: formula)
    assert COMPILED in proof.finding("squared_relu", HALF, CPU).milliseconds


PROGRAM = """
import json, os, sys, time
told, device, *operators = sys.argv[1:]
def tell(**line):
    print(json.dumps(line), file=open(told, "a"))
if {ready}:
    tell(ready=True)
for operator in operators:
    if operator == "rotary":
        {rotary}
    found = dict(serves="native", milliseconds=dict(native=1.0), problems={{}})
    tell(operator=operator, findings=dict(float32=found, half=found))
"""


def program(rotary: str = "pass", *, ready: bool = True) -> tuple[str, ...]:
    return sys.executable, "-c", PROGRAM.format(rotary=rotary, ready=ready)


def test_a_kernel_that_ends_its_process_costs_itself_alone() -> None:
    findings, lasting = verdicts.prove("cpu", program=program("sys.exit('illegal memory access')"))
    assert lasting and list(findings) == [*PROVEN[:4], *PROVEN[4:]] and PROVEN[4] == "rotary"
    for precision in (FLOAT32, HALF):
        lost = findings["rotary"][precision]
        assert lost.serves == REFERENCE
        assert lost.problems[NATIVE].startswith("ended its process with 1 (illegal memory access)")
    assert {findings[name][HALF].serves for name in PROVEN if name != "rotary"} == {NATIVE}
    sentences = Verdict(MACHINE, findings).warnings()
    assert len(sentences) == 2 and sentences[0].startswith("rotary, float32: the native kernel ended its process")


def test_a_kernel_that_hangs_leaves_the_references() -> None:
    findings, lasting = verdicts.prove("cpu", program=program("time.sleep(60)"), limit=2.0)
    assert not lasting and findings["rms_norm"][HALF].serves == NATIVE
    assert {findings[name][HALF].serves for name in PROVEN[4:]} == {REFERENCE}
    assert "did not end within" in findings["rotary"][FLOAT32].problems[NATIVE]


def test_a_device_that_cannot_be_used_now_proves_nothing() -> None:
    findings, lasting = verdicts.prove("cpu", program=(*program(ready=False)[:2], "raise SystemExit(3)"))
    assert not lasting
    assert all("could not be proven" in findings[name][HALF].problems[NATIVE] for name in PROVEN)


@COMPILED_CSRC
def test_the_program_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "PROVEN", ("chunked_cross_attention",))
    findings, lasting = verdicts.prove("cpu")
    assert lasting
    found = findings["chunked_cross_attention"]
    assert all(set(found[precision].milliseconds) == {REFERENCE, NATIVE} for precision in (FLOAT32, HALF))


def all_serve(backend: str) -> dict[str, dict[str, Finding]]:
    finding = Finding(backend, {REFERENCE: 2.0, NATIVE: 1.0})
    return {name: {FLOAT32: finding, HALF: finding} for name in PROVEN}


def test_a_verdict_is_read_back_only_whole_and_for_its_machine(tmp_path: Path) -> None:
    path, verdict = verdicts.verdict_path(MACHINE), Verdict(MACHINE, all_serve(NATIVE))
    assert path.is_relative_to(tmp_path / "cache") and "GPU-of-a-test" in path.name
    assert verdicts.read_verdict(path, MACHINE) is None
    verdicts.write_verdict(path, verdict)
    assert verdicts.read_verdict(path, MACHINE) == verdict
    other = Machine("cuda", MACHINE.name, "1.1", "abc", "2.0")
    assert verdicts.verdict_path(other) != path and verdicts.read_verdict(path, other) is None
    whole = path.read_text()
    for damaged in (whole[:-30], whole.replace('"native"', '"apex"', 1), "[]", "", "{}"):
        path.write_text(damaged)
        assert verdicts.read_verdict(path, MACHINE) is None, damaged[:20]
    partial = Verdict(MACHINE, {"rotary": all_serve(NATIVE)["rotary"]})
    verdicts.write_verdict(path, partial)
    assert verdicts.read_verdict(path, MACHINE) is None


def test_it_is_proven_once_and_again_where_damaged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proofs = []

    def prove(device: str) -> tuple[Any, bool]:
        proofs.append(device)
        return all_serve(NATIVE), True

    monkeypatch.setattr(verdicts, "prove", prove)
    path = verdicts.verdict_path(verdicts.machine_of("cpu"))
    for times, damage in ((1, False), (1, False), (2, True)):
        if damage:
            path.write_text("{")
        verdicts.verdict_of.cache_clear()
        assert verdicts.verdict_of("cpu").findings == all_serve(NATIVE)
        assert len(proofs) == times
    monkeypatch.setattr(verdicts, "prove", lambda device: (all_serve(REFERENCE), False))
    path.unlink()
    verdicts.verdict_of.cache_clear()
    assert verdicts.verdict_of("cpu").findings == all_serve(REFERENCE)
    assert not path.exists(), "what another try may find otherwise is not kept"
    monkeypatch.setattr(verdicts, "prove", prove)
    monkeypatch.setattr(verdicts, "write_file", refuse)
    verdicts.verdict_of.cache_clear()
    assert verdicts.verdict_of("cpu").findings == all_serve(NATIVE)
    assert "is not kept" in capsys.readouterr().err


def test_who_waited_for_a_proof_that_does_not_last_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a host want it at once, one after the other; who comes later tries again."""
    proofs = []

    def prove(device: str) -> tuple[Any, bool]:
        proofs.append(device)
        time.sleep(0.3)
        return all_serve(REFERENCE), False

    monkeypatch.setattr(verdicts, "prove", prove)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(verdicts.verdict_of.__wrapped__, ["cpu"] * 4))
    assert [each.findings for each in found] == [all_serve(REFERENCE)] * 4
    assert len(proofs) == 1
    verdicts.verdict_of.__wrapped__("cpu")
    assert len(proofs) == 2


def refuse(path: Path, content: str) -> None:
    raise EnvironmentProblem("the disk is full")


def test_auto_on_a_gpu_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = all_serve(NATIVE)
    lost = Finding(REFERENCE, {REFERENCE: 2.0}, {NATIVE: "is wrong: error 3.0e-01, allowed 1.0e-03 (bfloat16, 3x64)"})
    findings["rms_norm"][HALF] = lost
    monkeypatch.setattr(library, "cuda_problem", lambda: None)
    monkeypatch.setattr(library, "problem", lambda: None)
    monkeypatch.setattr(verdicts, "verdict_of", lambda device: Verdict(MACHINE, findings))
    monkeypatch.setattr(verdicts, "machine_of", lambda device: MACHINE)
    assert backends.uses_native("rotary", "cuda", torch.bfloat16)
    assert backends.backend_of("rms_norm", "cuda", torch.float32) == NATIVE
    assert backends.backend_of("rms_norm", "cuda", torch.bfloat16) == REFERENCE
    rows = dict(backends.backend_rows("cuda"))
    assert "native is wrong: error 3.0e-01, allowed 1.0e-03" in rows["kernel rms_norm"]
    assert "proven here: reference 2 ms, native 1 ms" in rows["kernel rotary"]
    assert rows["kernels were proven"] == str(verdicts.verdict_path(MACHINE))
    assert backends.choice("rotary", "cuda", FLOAT64).backend == REFERENCE
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert backends.choice("rotary", "cuda").backend == REFERENCE
    monkeypatch.setenv(VARIABLE, "rms_norm=native")
    assert backends.backend_of("rms_norm", "cuda", torch.bfloat16) == NATIVE


def settled(wishes: tuple[str, str]) -> tuple[str, ...]:
    """What serves after each rank came with a wish of its own."""
    os.environ[VARIABLE] = wishes[dist.get_rank()]
    settle_kernels(CPU)
    return tuple(backends.choice(name, "cpu").backend for name in ("rotary", "gelu", "gated_activation"))


@COMPILED_CSRC
@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        (("auto", "auto"), (NATIVE, REFERENCE, NATIVE)),
        (("rotary=native,gelu=native", "rotary=reference,gelu=native"), (REFERENCE, NATIVE, NATIVE)),
        (("native", "auto"), (NATIVE, REFERENCE, NATIVE)),
        (("native", "reference"), (REFERENCE, REFERENCE, REFERENCE)),
    ],
)
def test_all_ranks_decide_alike(wishes: tuple[str, str], expected: tuple[str, ...]) -> None:
    assert run_ranks(settled, 2, wishes) == [expected, expected]
