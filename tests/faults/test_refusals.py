"""What the system refuses, at every call of a few verbs: one message, code 2, nothing half-written, a rerun goes on.

A small library that is preloaded refuses (`refusing_system.c`): it meets the calls of Python, of Rust and of C++.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.artifacts.files import disk_problem

COMPILER = shutil.which("cc")
SOURCE = Path(__file__).with_name("refusing_system.c")
CODES = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EROFS)
RUN = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from megatron_retro.cli.main import main

folder, words, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
assert not (folder / "out").exists()
for call, part, code in cases:
    shutil.rmtree(folder / "out", ignore_errors=True)
    said = io.StringIO()
    os.environ.update(REFUSED_CALL=call, REFUSED_PATH=part, REFUSED_ERRNO=str(code))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        returned = main(words)
    del os.environ["REFUSED_CALL"]
    left = sorted(str(path.relative_to(folder)) for path in folder.glob("out/**/*") if path.is_file())
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        again = main(words)
    print(json.dumps([call, part, code, returned, said.getvalue(), left, again]), flush=True)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "refusing.so"
    if COMPILER is None:
        pytest.skip("no C compiler")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def refuse(shim: Path, folder: Path, words: list[str], cases: list[tuple[str, str, int]]) -> list[list[Any]]:
    """Run a verb once for each case: call, part of a path, number of the error."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), json.dumps(words), json.dumps(cases)],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_message(call: str, part: str, code: int, returned: int, said: str) -> str:
    """One error with the system's own words and code 2; the case in words."""
    case = f"{call} of {part}: {os.strerror(code)}\n{said}"
    assert returned == 2 and "Traceback" not in said and os.strerror(code) in said, case
    assert [line[:6] for line in said.splitlines()].count("error:") == 1, case
    return case


def test_preprocess(shim: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(50)))
    words = ["preprocess", "--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out" / "corpus")]
    words += ["--workers", "1", "--tokenizer-type", "ByteTokenizer"]
    cases = [(call, "/out/", code) for call in ("open", "write", "sync") for code in CODES]
    cases += [(call, "_text_document", code) for call in ("open", "write", "sync") for code in CODES]
    cases += [(call, "in.jsonl", code) for call in ("open", "read") for code in CODES]
    found = refuse(shim, tmp_path, words, cases)
    assert len(found) == len(cases)
    for call, part, code, returned, said, left, again in found:
        case = one_message(call, part, code, returned, said)
        assert "fix:" in said, case
        assert str(tmp_path) in said or call == "read", case
        published = [name for name in left if name.endswith((".bin", ".idx")) and ".unfinished/" not in name]
        assert not published, (case, left)
        assert again == 0, case


def test_inspect(shim: Path, tmp_path: Path) -> None:
    from megatron_retro.testing.corpora import write_documents

    write_documents(tmp_path / "corpus", [[1, 2, 3], [4, 5]])
    cases = [("open", "corpus.idx", code) for code in CODES] + [("read", "corpus.idx", code) for code in CODES]
    for _, part, code, returned, said, _, again in refuse(shim, tmp_path, ["inspect", str(tmp_path / "corpus")], cases):
        assert returned == 2 and "Traceback" not in said and os.strerror(code) in said, (part, code, said)
        assert again == 0


def test_convert(shim: Path, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        LlamaForCausalLM(LlamaConfig(**size, vocab_size=64)).save_pretrained(tmp_path / "theirs")
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "out" / "run"), "--tokenizer-type", "ByteTokenizer"]
    cases = [(call, "/out/", code) for call in ("open", "write", "sync") for code in CODES]
    cases += [("open", "/theirs/", code) for code in CODES] + [("read", "config.json", code) for code in CODES]
    found = refuse(shim, tmp_path, words, cases)
    assert len(found) == len(cases)
    for call, part, code, returned, said, left, again in found:
        case = one_message(call, part, code, returned, said)
        assert str(tmp_path) in said or call == "read", case
        assert not left and again == 0, (case, left, again)


class ByALibrary(Exception):
    """An error of a library's own kind."""


def chained(code: int) -> Exception:
    try:
        try:
            raise OSError(code, os.strerror(code))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_refusal_inside_an_error_of_a_library_is_named(code: int) -> None:
    path = Path("/data/out.safetensors")
    words = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
    for error in (ByALibrary(words), chained(code), OSError(code, os.strerror(code), f"{path}.partial-1-ab")):
        problem = disk_problem(error, path)
        assert problem is not None and str(path) in str(problem) and os.strerror(code) in str(problem)
        assert disk_problem(error) is not None
    elsewhere = disk_problem(OSError(code, os.strerror(code), "/other/shard"), path)
    assert elsewhere is not None and "/other/shard" in str(elsewhere) and "written, what" not in str(elsewhere)
    assert "/other/shard cannot be written" not in str(elsewhere)


def test_a_fault_of_ours_stays_one() -> None:
    assert disk_problem(ZeroDivisionError("ours")) is None
    assert disk_problem(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")) is None
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("can't start new thread")):
        assert "memory ran out" in str(disk_problem(error))
    assert "may start" in str(disk_problem(RuntimeError("Resource temporarily unavailable")))  # gloo's, for a thread
