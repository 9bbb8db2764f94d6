"""Builds `megatron_retro/ops/_operators.so`: torch operators on torch's stable ABI, for CPU and CUDA in one file.

One library serves every torch from 2.11 on, and a CPU torch loads it with the CUDA kernels inside: torch's CUDA stream
is looked up by name when it is loaded. The kernels under `cpu/` know nothing of torch and are compiled once per
instruction set; the best that the processor has is taken when the library is loaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from build_toolchain import (
    CompilerMissing,
    Unit,
    compile_all,
    compile_into,
    cuda_compiler,
    host_compiler,
    is_x86,
    link,
    run,
    say,
    switched_off,
)

SOURCES = Path(__file__).resolve().parent / "operators"
TARGET_TORCH = "0x020b000000000000"  # 2.11, the oldest torch that the library runs with
# A100, H100 and H200, B200, RTX Blackwell: those of them that nvcc knows; the last gets PTX too, for what comes after.
ARCHITECTURES = ("80", "90", "100", "120")

# Each has what its name says and everything before it. AVX-512 without BF16 instructions counts as AVX2.
INSTRUCTION_SETS = {
    "generic": ("-O1",),
    "avx2": ("-O2", "-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "avx512": (
        "-O2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c", "-mbmi2",
    ),
}  # fmt: skip


def build_operators(target: Path) -> None:
    """Compile and link; raises CompilerMissing where the package has to do without."""
    torch_home = _torch_home()
    compiler = host_compiler()
    nvcc = matching_nvcc()
    say(f"operators with {compiler}" + (f" and {nvcc}" if nvcc else "; no nvcc, so without CUDA kernels"))
    # nvcc links where there is one: it knows its static runtime, with which the file needs no CUDA to be loaded.
    linker = (nvcc, "-ccbin", compiler) if nvcc else (compiler,)
    link(linker, operator_objects(torch_home, compiler, nvcc), target, _libraries(torch_home))


def operator_objects(torch_home: Path, compiler: str, nvcc: str | None) -> list[Path]:
    """Every object file of the library; those that take longest begin first."""
    flags = (*_host_flags(torch_home), *(_facts(nvcc) if nvcc else ()))
    units = _cuda_units(nvcc, compiler, torch_home) if nvcc else []
    units += _kernel_units(compiler)
    return compile_all([*units, *(Unit(source, (compiler, *flags)) for source in sorted(SOURCES.glob("*.cpp")))])


def matching_nvcc() -> str | None:
    """nvcc, unless this torch is built for another CUDA: one process holds one driver and one runtime of each major."""
    import torch

    nvcc = cuda_compiler()
    if nvcc is None or torch.version.cuda is None:
        return nvcc
    ours = cuda_version(nvcc)
    if ours.split(".")[0] == torch.version.cuda.split(".")[0]:
        return nvcc
    say(f"no CUDA kernels: nvcc is of CUDA {ours}, this torch of CUDA {torch.version.cuda}; install a matching nvcc")
    return None


def cuda_version(nvcc: str) -> str:
    """`13.0`, as nvcc says it."""
    found = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"], "nvcc --version"))
    return found[1] if found else "unknown"


def architectures(nvcc: str) -> list[str]:
    """What the kernels are compiled for: $MEGATRON_RETRO_CUDA_ARCHITECTURES (`80;90`), the GPUs of this machine, or
    ours that nvcc knows."""
    wanted = os.environ.get("MEGATRON_RETRO_CUDA_ARCHITECTURES") or " ".join(gpus_here())
    if wanted:
        return sorted(wanted.replace(";", " ").split(), key=int)
    known = set(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"], "nvcc --list-gpu-arch")))
    return [arch for arch in ARCHITECTURES if arch in known]


def gpus_here() -> set[str]:
    """The architectures of this machine's GPUs that torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0
    return {"".join(map(str, torch.cuda.get_device_capability(index))) for index in range(count)}


def _facts(nvcc: str) -> tuple[str, ...]:
    made = architectures(nvcc)
    text = " ".join([*made, f"{made[-1]}+ptx"])
    return (f'-DMEGATRON_RETRO_ARCHITECTURES="{text}"', f'-DMEGATRON_RETRO_CUDA_VERSION="{cuda_version(nvcc)}"')


def kernel_objects() -> list[Path]:
    """The CPU kernels' object files, one per source and instruction set."""
    return compile_all(_kernel_units(host_compiler()))


def cuda_resources() -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilled) of every compiled kernel, from what ptxas said of it."""
    nvcc = cuda_compiler()
    if nvcc is None:
        return []
    found = []
    for path in compile_all(_cuda_units(nvcc, host_compiler(), _torch_home())):
        kernel, arch, spilled = "", "", 0
        for line in path.with_suffix(".log").read_text().splitlines():
            if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                kernel, arch = match.groups()
            elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                spilled = int(match[1]) + int(match[2])
            elif match := re.search(r"Used (\d+) registers", line):
                found.append((kernel, arch, int(match[1]), spilled))
    return found


def build_shim(target: Path, *, counting: bool = False) -> None:
    """The CUDA sources for the host, as `torch.ops.megatron_retro_shim` on CPU tensors; for tests.

    With `counting`, the process that loads it leaves beside it how often every line ran, for gcov.
    """
    torch_home = _torch_home()
    compiler = host_compiler()
    how = ("-O0", "--coverage") if counting else ("-O1",)
    flags = (
        "-std=c++17", *how, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
        f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", "-DMEGATRON_RETRO_SHIM",
        "-DMEGATRON_RETRO_NAMESPACE=megatron_retro_shim", f"-I{SOURCES.parent / 'shim'}", *_includes(torch_home),
    )  # fmt: skip
    units = [Unit(SOURCES / "schemas.cpp", (compiler, *flags), "shim")]
    units += [Unit(source, (compiler, *flags, "-x", "c++"), "shim") for source in _cuda_sources()]
    objects = compile_into(target.parent, units) if counting else compile_all(units)
    link((compiler, *how), objects, target, _libraries(torch_home))


def _cuda_sources() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def _torch_home() -> Path:
    try:
        import torch
    except ImportError as problem:
        raise CompilerMissing(
            "torch cannot be imported while building; install torch first and use pip's --no-build-isolation"
        ) from problem
    return Path(torch.__file__).resolve().parent


def _includes(torch_home: Path) -> tuple[str, ...]:
    include = torch_home / "include"
    return (f"-I{SOURCES}", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"))


def _host_flags(torch_home: Path) -> tuple[str, ...]:
    flags = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}")
    return (*flags, *_includes(torch_home))


def _kernel_units(compiler: str) -> list[Unit]:
    sets = INSTRUCTION_SETS if is_x86() else {"generic": ("-O2",)}
    flags = (
        "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno",
        "-fno-trapping-math",
    )  # fmt: skip
    return [
        Unit(source, (compiler, *flags, f"-I{SOURCES}", f"-DINSTRUCTION_SET={name}", *switches), name)
        for source in sorted((SOURCES / "cpu").glob("*.cpp"))
        for name, switches in sets.items()
    ]


def _cuda_units(nvcc: str, compiler: str, torch_home: Path) -> list[Unit]:
    made = architectures(nvcc)
    codes = [*((arch, f"sm_{arch}") for arch in made), (made[-1], f"compute_{made[-1]}")]
    targets = [word for arch, code in codes for word in ("-gencode", f"arch=compute_{arch},code={code}")]
    flags = (
        "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", compiler, "-Xptxas", "-v",
        "--expt-relaxed-constexpr", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
    )  # fmt: skip
    command = (nvcc, *flags, *targets, *_includes(torch_home))
    return [Unit(source, command) for source in _cuda_sources()]


def _libraries(torch_home: Path) -> tuple[str, ...]:
    return (f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10")


if __name__ == "__main__":  # ahead of an installation, which then finds the object files
    if not switched_off("MEGATRON_RETRO_NATIVE"):
        operator_objects(_torch_home(), host_compiler(), matching_nvcc())
