"""What nvcc made of the CUDA kernels, where there is nvcc and the library was built with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_retro.ops import library

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int, int]]]:
    """Of the kernels as they were compiled here: for other architectures nvcc would begin again."""
    made = library.compiled_architectures()
    if not made or not CSRC.exists():
        pytest.skip("csrc was compiled without nvcc")
    monkeypatch.setenv("MEGATRON_RETRO_CUDA_ARCHITECTURES", ";".join(arch for arch in made if arch.isdigit()))
    sys.path.insert(0, str(CSRC))
    try:
        from build_operators import cuda_resources
    finally:
        sys.path.remove(str(CSRC))
    found = cuda_resources()
    if not found:
        pytest.skip("no nvcc on this machine")
    yield found


def test_no_kernel_spills_registers(resources: list[tuple[str, str, int, int]]) -> None:
    assert [(kernel, arch, spilled) for kernel, arch, _, spilled in resources if spilled] == []


def test_every_architecture_has_every_kernel(resources: list[tuple[str, str, int, int]]) -> None:
    by_arch: dict[str, set[str]] = {}
    for kernel, arch, _, _ in resources:
        by_arch.setdefault(arch, set()).add(kernel)
    kernels = next(iter(by_arch.values()))
    assert all(each == kernels for each in by_arch.values())
    words = ("forward", "backward", "rotate", "statistics", "gradient", "backward_queries", "backward_keys")
    for word in (*words, "matrix_forward", "matrix_backward"):
        assert any(word in kernel for kernel in kernels)


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")
def test_the_report_that_is_kept_is_of_these_kernels(resources: list[tuple[str, str, int, int]]) -> None:
    """Another compiler gives other registers; which kernels there are, and that none spills, is ours."""
    sys.path.insert(0, str(CSRC))
    try:
        from kernel_resources import REPORT, report
    finally:
        sys.path.remove(str(CSRC))
    kept = json.loads(REPORT.read_text(encoding="utf-8"))
    assert kept.keys() == report().keys(), "python csrc/kernel_resources.py"
    assert all(figures["spilled"] == 0 for architectures in kept.values() for figures in architectures.values())
