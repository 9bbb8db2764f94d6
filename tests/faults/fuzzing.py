"""libFuzzer over each entry point of `csrc/host`, in processes that embed Python and call the bound functions.

`python -m tests.faults.fuzzing 3600` fuzzes all of them in turn, minimizes the inputs in `fuzz/corpus` and
writes `tests/results/fuzzing.json`. Without clang the targets still build, with g++, and run over given inputs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.fuzz_seeds import seeds
from tests.faults.injection import ROOT, commit

CORPUS = ROOT / "tests/faults/fuzz/corpus"
RESULTS = ROOT / "tests/results/fuzzing.json"
LIBRARIES = {"data": "csrc/host/[!b]*.cpp", "retrieval": "csrc/host/retrieval/[!b]*.cpp"}  # all but bindings.cpp
_FLAGS = ("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-pthread")
_CHECKS = "-D_GLIBCXX_ASSERTIONS"
_LONGEST = 2048  # bytes of an input


@dataclass(frozen=True)
class Target:
    """One entry point and the program that runs it."""

    name: str
    program: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The program with these options and inputs; a sanitizer's report is its error."""
        options = "detect_leaks=0:allocator_may_return_null=1"  # Python leaks at its end; memory may run out
        path = os.pathsep.join(word for word in sys.path if word)
        environment = {**os.environ, "FUZZED_ENTRY": self.name, "ASAN_OPTIONS": options, "PYTHONPATH": path}
        return subprocess.run([str(self.program), *words], env=environment, capture_output=True, text=True)

    def inputs(self, folder: Path) -> list[str]:
        """The committed inputs, unpacked."""
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(CORPUS / f"{self.name}.tar.xz") as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None and "/" not in member.name
                (folder / member.name).write_bytes(content.read())
        return [str(path) for path in sorted(folder.iterdir())]

    def fuzz(self, folder: Path, seconds: int) -> dict[str, object]:
        """Fuzz from the inputs in a folder, which grows, and count."""
        limits = (f"-max_total_time={seconds}", f"-max_len={_LONGEST}", "-timeout=20", "-rss_limit_mb=4096")
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = self.run(*limits, "-print_final_stats=1", f"-artifact_prefix={folder.parent}/", str(folder))
        executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
        edges = re.findall(r"cov: (\d+)", done.stderr)
        if done.returncode:
            print(done.stderr[-6000:], file=sys.stderr)
        return {
            "entry": self.name,
            "seconds": seconds,
            "seconds of a core": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, 1),
            "executions": int(executed[1]) if executed else None,
            "edges": int(edges[-1]) if edges else None,
            "findings": int(done.returncode != 0),
        }

    def minimize(self, folder: Path) -> int:
        """Commit the fewest inputs of a folder that reach the same; returns how many."""
        with tempfile.TemporaryDirectory() as fewest:
            self.run("-merge=1", f"-max_len={_LONGEST}", fewest, str(folder)).check_returncode()
            paths = sorted(Path(fewest).iterdir(), key=lambda path: (path.stat().st_size, path.name))
            with tarfile.open(CORPUS / f"{self.name}.tar.xz", "w:xz") as archive:
                for path in paths:
                    member = tarfile.TarInfo(path.name[:16])
                    member.size = path.stat().st_size
                    archive.addfile(member, io.BytesIO(path.read_bytes()))
        return len(paths)


def compiler() -> tuple[str, bool]:
    """clang++, which has libFuzzer, or g++, which only runs over inputs."""
    clang = shutil.which("clang++")
    return (clang, True) if clang else ("g++", False)


def build(folder: Path, root: Path = ROOT, libraries: Mapping[str, str] = LIBRARIES) -> list[Target]:
    """The programs of all entry points, with the address and undefined-behaviour sanitizers."""
    import pybind11

    program, fuzzes = compiler()
    sanitizers = "-fsanitize=address,undefined" + ",fuzzer" * fuzzes
    includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include(), f"-I{root}/csrc/host"]
    place = str(sysconfig.get_config_var("LIBDIR"))
    python = [f"-L{place}", f"-Wl,-rpath,{place}", f"-lpython{sysconfig.get_python_version()}"]
    targets = []
    for name, pattern in libraries.items():
        fuzz, target = root / "tests/faults/fuzz", folder / name
        own = [fuzz / "entry.cpp", fuzz / f"{name}.cpp", *([] if fuzzes else [fuzz / "replay.cpp"])]
        sources = [str(source) for source in [*own, *sorted(root.glob(pattern))]]
        command = [program, *_FLAGS, _CHECKS, sanitizers, *includes, *sources, *python, "-o", str(target)]
        subprocess.run(command, check=True)
        listed = subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout.split()
        targets += [Target(entry, target) for entry in listed]
    return targets


def main() -> None:
    """Fuzz for the wanted time in all and write down the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=int, help="for all entry points together")
    seconds, rows = parser.parse_args().seconds, []
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        targets, first = build(room), seeds(room / "seeds")
        for target in targets:
            folder = room / f"inputs-{target.name}" / "corpus"
            folder.mkdir(parents=True)
            if (CORPUS / f"{target.name}.tar.xz").exists():
                target.inputs(folder)
            (folder / "seed").write_bytes(first[target.name])
            row = target.fuzz(folder, seconds // len(targets))
            for finding in folder.parent.glob("*-*"):
                shutil.copy(finding, Path(tempfile.gettempdir()) / f"finding-{target.name}-{finding.name[:20]}")
            rows.append(row if row["findings"] else {**row, "inputs": target.minimize(folder)})
            print(json.dumps(rows[-1]), flush=True)
    version = subprocess.run([compiler()[0], "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    versions = {"compiler": version, "python": platform.python_version(), "numpy": importlib.metadata.version("numpy")}
    facts = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
