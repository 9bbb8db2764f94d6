"""Registers and spilled bytes of every CUDA kernel by architecture, as nvcc reports them: `resources.json` keeps them.

python csrc/kernel_resources.py        writes the file anew; a test says when it is not of these sources
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from build_operators import cuda_resources

REPORT = Path(__file__).with_name("resources.json")
Report = dict[str, dict[str, dict[str, int]]]


def report() -> Report:
    """Kernel, architecture, figure."""
    found = cuda_resources()
    mangled = "\n".join(kernel for kernel, *_ in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    rows: Report = {}
    for name, (_, arch, registers, spilled) in sorted(zip(names, found, strict=True)):
        kernel = name.removeprefix("void ").replace("megatron_retro::", "").replace("(anonymous namespace)::", "")
        rows.setdefault(kernel.replace("device::", ""), {})[arch] = {"registers": registers, "spilled": spilled}
    return rows


if __name__ == "__main__":
    lines = [f"{json.dumps(kernel)}: {json.dumps(figures)}" for kernel, figures in report().items()]
    REPORT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
