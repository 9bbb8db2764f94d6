"""Studies of tiny runs: whole, interrupted, failed, refused, shared; their figures against the logs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.ablation.program import FailedRuns, run_study
from megatron_retro.ablation.runs import neighbor_shortage
from megatron_retro.artifacts.claims import BlockClaims
from megatron_retro.cli.main import main
from megatron_retro.config.sections import STUDY_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.config.toml_files import render_toml
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.neighbor_table import unpack_ids
from megatron_retro.data.neighbor_transforms import ThinnedDatabase
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.testing.tiny_corpus import TinyCorpus, write_tiny_corpus

LOG_WRITER = """
import json, pathlib, sys
words = sys.argv[1:]
run = pathlib.Path(words[words.index("--save") + 1])
recipe = pathlib.Path(words[words.index("--config") + 1]).read_text()
if "num_layers = 3" in recipe and not pathlib.Path("mended").exists():
    sys.exit("error: three is too many")
run.mkdir(exist_ok=True)
log = (run / "events.jsonl").open("a")
done = log.tell() > 0
loss = 3.0 if "num_layers = 2" in recipe else 2.0
events = [
    {"event": "started", "parameters": 7},
    {"event": "step", "step": 1 + done, "seconds": {"compute": 1.0}},
]
if done:
    samples = {"losses": [loss * 4, loss * 8], "tokens": [4, 8], "texts": [1, 2]}
    if "num_layers = 5" in recipe:
        loss, samples["losses"] = None, [None, None]
    events.append({"event": "evaluation", "step": 2, "seconds": 0.5, "loss": loss, "facts": {"samples": samples}})
log.write("".join(json.dumps(event) + chr(10) for event in events))
sys.exit(0 if done else 75)
"""


def study(output: Path, **fields: Any) -> Settings:
    given = {"study_output": str(output), **fields}
    return build_settings(STUDY_SECTIONS, given, dict.fromkeys(given, "flag"))


def pretend(output: Path, tmp_path: Path, **fields: Any) -> Settings:
    """A study whose runs only write a log: they ask for a second start, and one size of model fails."""
    program = tmp_path / "log_writer.py"
    program.write_text(LOG_WRITER)
    return study(output, study_launcher=[sys.executable, str(program)], **fields)


def run(settings: Settings) -> None:
    run_study(settings)


def raw_results(output: Path) -> dict[str, Any]:
    found = json.loads((output / "study.json").read_text())
    return {result["name"]: result for result in found["runs"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def test_a_study_of_real_runs(tmp_path: Path, corpus: TinyCorpus) -> None:
    recipe = tmp_path / "study.toml"
    recipe.write_text(
        f"""
[ablation]
study_output = "{tmp_path / "study"}"
study_grid = ["database_keep_fraction = [1.0, 0.25]"]
[model]
hidden_size = 16
vocab_size = 257
[retro]
retro_add_retriever = true
retro_chunk_length = 16
retro_num_neighbors = 1
retro_layers = [1, 2]
[data]
seq_length = 64
split = "80,20,0"
data_path = ["{corpus.tokens}"]
neighbor_path = ["{corpus.table}"]
database_path = "{corpus.database}"
num_workers = 0
[training]
train_iters = 2
global_batch_size = 2
eval_iters = 3
"""
    )
    command = [sys.executable, "-m", "megatron_retro.cli.main", "ablate", "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = raw_results(tmp_path / "study")
    whole, quarter = (results[f"database_keep_fraction={share}"] for share in ("1.0", "0.25"))
    assert whole["outcome"]["shortage"] == 0
    assert quarter["outcome"]["shortage"] > 0.3
    samples = whole["evaluation"]["facts"]["samples"]
    assert samples["tokens"] == quarter["evaluation"]["facts"]["samples"]["tokens"]
    assert sum(samples["losses"]) / sum(samples["tokens"]) == pytest.approx(whole["evaluation"]["loss"], abs=1e-4)
    mean = quarter["evaluation"]["loss"] - whole["evaluation"]["loss"]
    assert f"{mean:+.4f}" in done.stderr
    page = (tmp_path / "study" / "report.html").read_text()
    assert "<svg" in page and f"{mean:+.4f}" in page and "not finished" not in page
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "run database_keep_fraction" not in again.stderr


def test_a_study_of_evaluations(tmp_path: Path, corpus: TinyCorpus, capsys: pytest.CaptureFixture[str]) -> None:
    """One trained model, fewer and worse neighbours; figures are those of the evaluation itself."""
    made = tmp_path / "model"
    settings = corpus.settings(retro_num_neighbors=1, train_iters=1, eval_iters=1, save=str(made), split="60,40,0")
    recipe = tmp_path / "model.toml"
    recipe.write_text(render_toml(settings))
    assert main(["pretrain", "--config", str(recipe)]) == 0
    cases = ["whole = {}", "none = {neighbor_absent_share = 1.0}", "quarter = {database_keep_fraction = 0.25}"]
    words = ["--study-verb", "perplexity", "--study-output", str(tmp_path / "study"), "--study-cases", *cases]
    assert main(["ablate", *words, "--load", str(made), "--shard", "0/1"]) == 0
    whole, none, quarter = raw_results(tmp_path / "study").values()
    direct = tmp_path / "direct"
    measured = ["--load", str(made), "--eval-output", str(direct), "--neighbor-absent-share", "1.0"]
    assert main(["evaluate", "perplexity", *measured]) == 0
    result = json.loads((direct / "perplexity.json").read_text())
    assert none["evaluation"]["loss"] == result["variants"]["real"]["loss"][0]
    assert whole["evaluation"]["facts"]["samples"]["texts"] == result["samples"]["texts"]
    shortages = [one["evaluation"]["facts"]["shortage"] for one in (whole, quarter, none)]
    assert shortages[0] == 0 < shortages[1] < shortages[2] == 1
    mean = none["evaluation"]["loss"] - whole["evaluation"]["loss"]
    assert f"{mean:+.4f}" in capsys.readouterr().err


def test_runs_go_on_fail_and_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = pretend(tmp_path / "study", tmp_path, study_grid=["num_layers = [2, 3, 4]", "seed = [1, 2]"])
    with pytest.raises(FailedRuns, match="2 of 6 runs failed"):
        run(settings)
    results = raw_results(tmp_path / "study")
    assert results["num_layers=2,seed=1"]["step"] == 2
    assert results["num_layers=3,seed=2"]["state"] == "failed (exit code 1)"
    page = (tmp_path / "study" / "report.html").read_text()
    assert "2 of 6 runs are not finished" in page and "error: three is too many" in page
    table = capsys.readouterr().err
    assert "0 of 2 finished; 1: failed (exit code 1); 2: failed (exit code 1)" in table
    before = results["num_layers=2,seed=1"]["outcome"]
    (tmp_path / "mended").touch()
    run(settings)
    results = raw_results(tmp_path / "study")
    assert {result["state"] for result in results.values()} == {"finished"}
    assert results["num_layers=2,seed=1"]["outcome"] == before
    page = (tmp_path / "study" / "report.html").read_text()
    assert "4: better than 2, -1.0000: clear over documents, clear over seeds." in page
    assert "against num_layers" in page and "rect" not in page, "numbers make a line with its band, no bars"


def test_a_run_that_diverged_is_not_called_equal(tmp_path: Path) -> None:
    run(pretend(tmp_path / "study", tmp_path, study_grid=["num_layers = [2, 5]"]))
    page = (tmp_path / "study" / "report.html").read_text()
    assert "5: its loss or that of 2 is no number: a run diverged." in page and "not told apart" not in page


def test_one_worker_of_two_leaves_what_another_holds(tmp_path: Path) -> None:
    output = tmp_path / "study"
    others = iter(BlockClaims(output / "claims", ["num_layers=2"], lambda name: False))
    with closing(others):  # type: ignore[type-var]
        assert next(others) == "num_layers=2"
        run(pretend(output, tmp_path, study_grid=["num_layers = [2, 4]"], shard="0/2"))
    results = raw_results(output)
    assert results["num_layers=2"]["state"] == "not started"
    assert results["num_layers=4"]["state"] == "finished"
    assert "1 of 2 runs are not finished: num_layers=2: not started" in (output / "report.html").read_text()


def test_other_settings_are_refused_before_anything_runs(tmp_path: Path) -> None:
    output = tmp_path / "study"
    grid = ["num_layers = [2, 4]"]
    run(pretend(output, tmp_path, study_grid=grid))
    with pytest.raises(ArtifactError, match="other settings") as error:
        run(pretend(output, tmp_path, study_grid=grid, lr=0.5))
    assert "lr = 0.5" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"study_grid": ["num_layer = [2]"]}, "did you mean num_layers"),
        ({"study_grid": ["num_layers = 2"]}, "expected a list of values"),
        ({"study_grid": ["num_layers = [2, 0]"]}, "num_layers = 0: expected a whole number of at least 1"),
        ({"study_grid": ["lr = [1.0, 1.0]"]}, "1.0 is there twice"),
        ({"study_grid": ["lr = [1.0]"], "study_cases": ["a = {lr = 2.0}"]}, "lr is set by case and by lr"),
        ({"study_grid": ["lora_rank = [2]"]}, "lora_rank is no setting of these runs"),
        ({"study_cases": ["a = 3"]}, "expected a table of fields"),
        ({"study_cases": ["a = {save = 'x'}"]}, "save is set by the study"),
        ({"study_grid": ["retro_layers = [[1], [2]]"], "study_verb": "perplexity"}, "retro_layers is no setting"),
        ({}, "nothing is varied"),
        ({"study_grid": ["lr = [1.0]"], "save": "x"}, "drop --save"),
        ({"study_grid": ["eval_iters = [1, 0]"]}, "eval_iters=0 with eval_iters = 0"),
        ({"study_grid": ["lr = [1.0"]}, "not valid TOML"),
    ],
)
def test_what_cannot_be_a_study_is_said_and_nothing_written(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run(study(tmp_path / "study", **fields))
    assert message in str(error.value)
    assert not (tmp_path / "study").exists()


def test_shortage_is_that_of_the_rows(corpus: TinyCorpus) -> None:
    """Counted the slow way: every chunk that a training sample holds, by the rule written in NumPy."""
    for fraction, unit in ((1.0, "document"), (0.5, "document"), (0.1, "document"), (0.5, "chunk")):
        settings = corpus.settings(retro_num_neighbors=2, database_keep_fraction=fraction, database_keep_by=unit)
        source = build_dataset(settings, "train", eod=None).sources[0]
        reader, length = source.neighbors, source.samples.chunks_per_sample
        thinned = ThinnedDatabase(fraction, unit == "chunk")
        assert reader is not None
        firsts = source.samples.first_chunks(np.arange(source.samples.num_samples))
        short = []
        for first in firsts:
            saved = unpack_ids(reader.table.packed_rows(int(first), int(first) + length))
            for row in saved:
                ids = row[row >= 0]
                documents = reader.database.document_of(ids)
                own = range(int(first) // 8, (int(first) + length) // 8 + 1)
                legal = thinned.keeps(reader.database, ids, documents) & ~np.isin(documents, own)
                short.append(legal.sum() < 2)
        assert neighbor_shortage(settings) == pytest.approx(np.mean(short))


def test_a_request_to_stop_reaches_the_run_and_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    program = tmp_path / "patient.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    launcher = ["--study-launcher", sys.executable, str(program)]
    words = ["--study-output", str(tmp_path / "study"), "--study-grid", "lr = [1.0, 2.0]", *launcher]
    process = subprocess.Popen([sys.executable, "-m", "megatron_retro.cli.main", "ablate", *words])
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    states = {result["state"] for result in raw_results(tmp_path / "study").values()}
    assert states == {"not started"}
    assert not list((tmp_path / "study" / "claims").glob("*.claim"))
