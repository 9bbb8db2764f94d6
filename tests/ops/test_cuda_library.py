"""How the compiled library meets a GPU: torch's stream, the architectures and the CUDA it was built for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_retro.ops import library
from megatron_retro.ops.backends import problems

CSRC = Path(__file__).parents[2] / "csrc"
compiled = pytest.mark.skipif(not library.compiled_architectures(), reason="csrc was compiled without nvcc")


@pytest.fixture
def fresh_verdict() -> Iterator[None]:
    library.cuda_problem.cache_clear()
    yield
    library.cuda_problem.cache_clear()


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CSRC))
    import build_operators

    return build_operators


@pytest.mark.skipif(library.problem() is not None or not shutil.which("nm"), reason="needs the library and nm")
def test_no_symbol_of_torch_may_be_missing_in_silence() -> None:
    """A weak name that torch does not export to all is address zero, and a crash at the first launch."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library.PATH], capture_output=True, text=True, check=True)
    weak = [line.split()[1] for line in listed.stdout.splitlines() if line.split()[0] == "w"]
    assert [name for name in weak if "torch" in name or "cuda" in name] == []


@pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
def test_a_stream_that_is_not_found_is_said_when_the_library_is_loaded() -> None:
    assert library.find_stream("libno_such_library.so") == "it is not loaded"
    lost = library.find_stream("libtorch_cpu.so")
    assert lost is not None and "aoti_torch_get_current_cuda_stream" in lost


@pytest.mark.cuda_build
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that is built with CUDA")
def test_a_cuda_torch_gives_its_stream() -> None:
    assert library.problem() is None
    assert library.find_stream(library.LIBTORCH_CUDA) is None
    script = "from megatron_retro.ops import library; print(library.cuda_problem())"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "stream" not in said


@pytest.mark.parametrize(
    ("capability", "made", "runs"),
    [
        ((8, 0), ("80", "90", "90+ptx"), True),
        ((8, 9), ("80", "90", "90+ptx"), True),
        ((9, 0), ("80", "90"), True),
        ((9, 0), ("80",), False),
        ((9, 0), ("80", "80+ptx"), True),
        ((12, 0), ("80", "90", "90+ptx"), True),
        ((12, 0), ("80", "90", "100"), False),
        ((10, 3), ("100",), True),
        ((10, 0), ("103",), False),
        ((7, 5), ("80", "80+ptx"), False),
    ],
)
def test_which_gpus_a_build_serves(capability: tuple[int, int], made: tuple[str, ...], runs: bool) -> None:
    assert library.runs_on(capability, made) is runs


@compiled
def test_a_build_for_another_gpu_or_another_cuda_is_named(monkeypatch: pytest.MonkeyPatch, fresh_verdict: None) -> None:
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    assert any("this torch with 11.8" in reason for reason in problems("native", "rotary", "cuda"))
    library.cuda_problem.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", library.cuda_version())
    monkeypatch.setattr(library, "find_stream", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert any("this GPU is 75" in reason for reason in problems("native", "rotary", "cuda"))


@compiled
def test_every_build_carries_ptx_for_gpus_to_come() -> None:
    assert any(word.endswith("+ptx") for word in library.compiled_architectures())
    assert library.runs_on((15, 0), library.compiled_architectures())


def test_nvcc_of_another_cuda_than_torchs_builds_no_kernels(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "cuda_compiler", lambda: "nvcc")
    monkeypatch.setattr(build, "run", lambda command, name: "Cuda compilation tools, release 13.0, V13.0.88")
    for torchs, expected in ((None, "nvcc"), ("13.2", "nvcc"), ("12.8", None)):
        monkeypatch.setattr(torch.version, "cuda", torchs)
        assert build.matching_nvcc() == expected
    assert "nvcc is of CUDA 13.0, this torch of CUDA 12.8" in capsys.readouterr().err


def test_a_gpu_that_torch_cannot_use_asks_for_no_architecture(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver counts it, and CUDA does not begin: asked for its architecture, torch would raise."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.gpus_here() == set()


def test_architectures_are_asked_for_or_those_that_nvcc_knows(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "run", lambda command, name: "compute_75\ncompute_80\ncompute_90\ncompute_100\n")
    monkeypatch.delenv("MEGATRON_RETRO_CUDA_ARCHITECTURES", raising=False)
    monkeypatch.setattr(build, "gpus_here", lambda: set())
    assert build.architectures("nvcc") == ["80", "90", "100"]
    monkeypatch.setattr(build, "gpus_here", lambda: {"90"})
    assert build.architectures("nvcc") == ["90"]
    monkeypatch.setenv("MEGATRON_RETRO_CUDA_ARCHITECTURES", "100;86")
    assert build.architectures("nvcc") == ["86", "100"]
