"""An export goes to a hub with a card that says what its run's files say, through the hub's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_retro.checkpoint.directory import complete_checkpoints
from megatron_retro.checkpoint.loading import describe_checkpoint
from megatron_retro.cli.main import main
from megatron_retro.convert.model_card import CARD, model_card
from megatron_retro.reporting.perplexity_page import read_perplexity
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.testing.tiny_corpus import TinyCorpus, write_tiny_corpus
from megatron_retro.training.program import pretrain
from tests.convert.local_hub import LocalHub, serving, told

TOKEN = "hf_secretofatest"
NAME = "team/retro"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("push") / "corpus")


@pytest.fixture(scope="module")
def run(corpus: TinyCorpus) -> Path:
    """A Retro of four steps, measured after the second and the fourth, and its last checkpoint on windows besides."""
    run = corpus.tokens.parent.parent / "run"
    llama = {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True}
    steps = {"train_iters": 4, "eval_interval": 2, "eval_iters": 1, "save_interval": 2}
    pretrain(corpus.settings(save=str(run), **llama, **steps))
    words = [
        "--load",
        str(run),
        "--eval-output",
        str(run / "evaluation"),
        "--perplexity-windows",
        "4",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", "perplexity", *words]) == 0
    return run


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    words = ["--convert-to", "remote-code", "--convert-shard-megabytes", "1"]
    assert main(["convert", str(run), str(run.parent / "export"), *words]) == 0
    return run.parent / "export"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with serving(LocalHub(token=TOKEN)) as found:
        yield found


def pushed(words: list[str], hub: LocalHub, home: Path, token: str = TOKEN) -> tuple[int, str]:
    """Exit code, and all that was said."""
    run = told(["push", *words], hub, home, HF_TOKEN=token, HF_HUB_DISABLE_XET="1")
    return run.returncode, run.stdout + run.stderr


def test_a_card_says_what_the_run_says(run: Path, export: Path, corpus: TinyCorpus) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(export / CARD)
    assert card.data.library_name == "transformers" and {"megatron-retro", "retro"} <= set(card.data.tags)
    checkpoint, log = describe_checkpoint(run), read_run_log(run)
    inputs, evaluation = checkpoint.manifest.inputs, log.evaluations[-1]
    measured = read_perplexity(run / "evaluation" / "perplexity.json")
    assert evaluation.retrieval is not None and measured.leakage is not None
    for fact in (
        f"| steps | {checkpoint.step} |",
        f"| tokens | {checkpoint.manifest.counts['tokens']:,} |",
        "| processes | 1 |",
        f"| text | {corpus.tokens.name} | `{inputs['corpus 0'][:12]}` |",
        f"| database of neighbours | {corpus.database.name} | `{inputs['database'][:12]}` |",
        f"| none | {evaluation.retrieval.losses['none'].mean:.4f} | {evaluation.retrieval.excess['none']} |",
        *(f"- {alarm}" for alarm in evaluation.alarms),
        f"| {measured.leakage.alphas[-1]} | {measured.leakage.chunks[-1]} | {measured.leakage.excess['none'][-1]} |",
    ):
        assert fact in card.text, fact
    assert str(run.parent) not in card.content and "license" not in card.content


def test_a_card_leaves_out_what_is_not_known_of_this_checkpoint(run: Path, tmp_path: Path) -> None:
    """An older step takes nothing of what came after it; a decoder alone nothing of what neighbours did."""
    early, late = (model_card(path, "name", "remote-code") for path in complete_checkpoints(run))
    assert "after step 2:" in early and "after step 4:" not in early and "Leakage" not in early
    assert "after step 4:" in late and "Leakage" in late
    decoder = model_card(run, "name", "huggingface")
    assert "| steps | 4 |" in decoder and not re.search("Held-out|Leakage|last loss|retrieval-augmented", decoder)
    assert main(["convert", str(run), str(tmp_path / "decoder"), "--convert-to", "huggingface"]) == 2
    words = ["--convert-to", "huggingface", "--convert-decoder-only"]
    assert main(["convert", str(run), str(tmp_path / "decoder"), *words]) == 0
    words = ["convert", str(tmp_path / "decoder"), str(tmp_path / "again"), "--tokenizer-type", "ByteTokenizer"]
    assert main(words) == 0
    bare = model_card(tmp_path / "again", "name", "huggingface")
    assert "| started from | decoder |" in bare and not re.search("steps|Layout|Held-out", bare)


def test_an_export_goes_up_whole_and_private(export: Path, hub: LocalHub, tmp_path: Path) -> None:
    code, said = pushed([str(export), NAME], hub, tmp_path)
    assert code == 0, said
    assert f"{hub.address}/{NAME}" in said and TOKEN not in said
    assert hub.models[NAME, "main"] == {one.name: one.read_bytes() for one in export.iterdir()}
    assert hub.visibility == {NAME: "private"} and len(hub.commits) == 1
    code, said = pushed([str(export), f"{NAME}@trial", "--push-public"], hub, tmp_path)
    assert code == 0, said
    assert hub.visibility == {NAME: "private"}, "one that is there stays as it is"
    assert hub.models[NAME, "trial"] == hub.models[NAME, "main"]


def test_what_fails_halfway_goes_on_by_the_same_command(export: Path, hub: LocalHub, tmp_path: Path) -> None:
    hub.room = 1
    code, said = pushed([str(export), NAME], hub, tmp_path)
    assert code == 2 and "run the same command again" in said and "Traceback" not in said and TOKEN not in said
    assert hub.models[NAME, "main"] == {} and len(hub.uploads) == 1
    hub.room = None
    code, said = pushed([str(export), NAME], hub, tmp_path)
    assert code == 0, said
    assert hub.models[NAME, "main"] == {one.name: one.read_bytes() for one in export.iterdir()}
    assert len(hub.uploads) == len(set(hub.uploads)) == 2, "what arrived is not sent again"


def test_what_cannot_go_up_is_one_message(
    run: Path, export: Path, hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = pushed([str(export), NAME], hub, tmp_path, token="hf_another")
    assert code == 2 and "HF_TOKEN" in said and "Traceback" not in said and "hf_another" not in said
    for words, complaint in (
        ([str(run), NAME], "is no export"),
        ([str(export), "no name"], "is no name on the hub"),
        ([str(export)], "FOLDER NAME"),
    ):
        assert main(["push", *words]) == 2
        assert complaint in capsys.readouterr().err
