"""torchrun's elastic agent brings a run back whose rank was killed, to the unbroken run's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences
from megatron_retro.training.program import pretrain

MORE = {"train_iters": 12, "save_interval": 2, "global_batch_size": 8, "eval_iters": 0, "hidden_dropout": 0.1}
# Rank 1 of the first attempt kills itself when five steps are told.
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from megatron_retro.testing.tiny_corpus import TinyCorpus
from megatron_retro.training.program import pretrain

torch.set_num_threads(1)
tokens, database, table, run = map(Path, sys.argv[1:])

def die_in_time():
    events = run / "events.jsonl"
    while not events.exists() or events.read_text().count('"event": "step"') < 5:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    threading.Thread(target=die_in_time, daemon=True).start()
pretrain(TinyCorpus(tokens, database, table).settings(save=str(run), **MORE))
"""


@pytest.mark.full
def test_the_agent_restarts_a_run_whose_rank_was_killed(corpus: TinyCorpus, tmp_path: Path) -> None:
    whole = corpus.settings(save=str(tmp_path / "whole"), **MORE)
    run_ranks(lambda: pretrain(whole), 2, initialize=False, timeout=100)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("**MORE", f"**{MORE!r}"), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    places = [str(path) for path in (corpus.tokens, corpus.database, corpus.table, tmp_path / "broken")]
    ended = subprocess.run(
        [sys.executable, *launcher, str(program), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-4000:]
    starts = read_run_log(tmp_path / "broken").starts
    assert starts[0] == 0 and len(starts) == 2 and starts[1] >= 4, "it went on from a checkpoint"
    assert differences(tmp_path / "whole", tmp_path / "broken") == []
