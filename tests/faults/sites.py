"""Runs a verb once for each site at which it meets the system, and refuses it there; run under `refusing_system.c`.

`sites.py FOLDER WORDS CODES NUMBER`: what the verb writes lies in FOLDER/out. An undisturbed run tells the sites: each
kind of call on each file. Then each site refuses, with each code or, where NUMBER is not 0, at so many chosen sites
with one code each. A line of JSON tells what came of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from megatron_retro.cli.main import main
from megatron_retro.inference.serving import server

_SECONDS = 60
_TEMPORARY = re.compile(r"\.(partial|retired)-[^/]*")
# What tells the time, or which process it was.
_VARYING = re.compile(r"manifest\.json$|\.jsonl?$|\.html$|\.claim$|\.lock$|/claims/|\.toml$|\.npz$")


def run(words: list[str], log: Path, **environment: str) -> int:
    """The verb in a forked process; -1 where it did not end."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(_SECONDS)
            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if words[0] == "serve":
                server.Server.run = lambda self, sockets=None: None  # type: ignore[method-assign]
            os.environ.update(environment)
            code = main(words)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(folder: Path) -> dict[str, str]:
    """What lies in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _VARYING.search(str(path))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sites(trace: Path, folder: Path) -> list[tuple[str, str]]:
    """Each kind of call with the last part of each path that it met, temporary or not."""
    found = {}
    for line in trace.read_text(encoding="utf-8").splitlines():
        call, _, path = line.partition(" ")
        name = _TEMPORARY.sub("", path.removesuffix(" (deleted)")).rstrip("/").rsplit("/", 1)[-1]
        if path.startswith(str(folder)) and name not in (folder.name, "log"):
            found[call, "/" + name] = None
    return sorted(found)


def run_all(folder: Path, words: list[str], codes: list[int], number: int) -> None:
    """Tell of every case in a line."""
    out, log, trace = folder / "out", folder / "log", folder.parent / "trace"
    began = time.monotonic()
    assert run(words, log, REFUSED_TRACE=str(trace), REFUSED_PATH=str(folder)) == 0, log.read_text()
    seconds, wanted = time.monotonic() - began, digest(out)
    every = sites(trace, folder)
    cases = [(call, part, code) for call, part in every for code in codes]
    if number:
        dice = random.Random(18)
        cases = [(call, part, dice.choice(codes)) for call, part in dice.sample(every, min(number, len(every)))]
    print(json.dumps({"sites": len(every), "cases": len(cases), "seconds": round(seconds, 2)}), flush=True)
    again_at: set[tuple[str, str]] = set()
    for call, part, code in cases:
        shutil.rmtree(out, ignore_errors=True)
        returned = run(words, log, REFUSED_CALL=call, REFUSED_PATH=part, REFUSED_ERRNO=str(code))
        said, again = log.read_text(encoding="utf-8", errors="replace"), ""
        if returned == 0:
            again = "same" if digest(out) == wanted else "other bytes without a word"
        elif (call, part) not in again_at:
            again_at.add((call, part))
            code_again = run(words, log)
            again = log.read_text(encoding="utf-8")[-500:] if code_again else "other bytes"
            again = "same" if code_again == 0 and digest(out) == wanted else again
        print(json.dumps([call, part, code, returned, said[-3000:], again]), flush=True)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
