"""Perplexity against a token-by-token computation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megatron_retro.assembly.loading import LoadedModel, load_model
from megatron_retro.assembly.replica_losses import losses_of_model
from megatron_retro.config.data import WorkersConfig
from megatron_retro.config.evaluation import EvaluationConfig, PerplexityConfig
from megatron_retro.config.inference import EngineConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import PeftConfig
from megatron_retro.convert.checkpoint_files import write_checkpoint
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.dataset import Boundaries, Dataset
from megatron_retro.data.neighbor_transforms import VARIANTS
from megatron_retro.errors import ConfigError, DamagedArtifact
from megatron_retro.evaluation.leakage import ALPHAS
from megatron_retro.evaluation.perplexity import (
    Measured,
    Window,
    measure,
    read_windows,
    sliding_windows,
    spread,
    window_documents,
)
from megatron_retro.evaluation.perplexity_run import run_perplexity
from megatron_retro.microbatch import Microbatch, Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.peft.attach import added_parameters, attach, initialize
from megatron_retro.peft.prompts import virtual_token_ids
from megatron_retro.reporting.perplexity_page import read_perplexity
from megatron_retro.runtime.strict_json import json_text, to_plain
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.tiny_corpus import CHUNK, EOD, TinyCorpus, write_tiny_corpus
from megatron_retro.training.program import pretrain


@dataclass(frozen=True)
class Setting:
    """A trained model and what it is measured on."""

    corpus: TinyCorpus
    run: Path
    model: LoadedModel
    dataset: Dataset


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("perplexity")
    corpus = write_tiny_corpus(directory / "corpus")
    settings = corpus.settings(save=str(directory / "run"), train_iters=20, eval_iters=0)
    pretrain(settings)
    model = load_model(directory / "run")
    yield Setting(corpus, directory / "run", model, build_dataset(settings, "valid", eod=model.tokenizer.eod))


def of_model(setting: Setting, windows: Sequence[Window], variant: str, batch_size: int) -> Measured:
    losses, device = losses_of_model(setting.model), torch.device("cpu")
    return measure(losses, setting.dataset, windows, [variant], batch_size=batch_size, device=device)[variant]


def test_each_token_is_scored_once_with_the_most_context(setting: Setting) -> None:
    for stride in (CHUNK, 2 * CHUNK, 4 * CHUNK):
        windows = sliding_windows(setting.dataset, stride)
        measured = of_model(setting, windows, "real", 3)
        assert len(np.unique(measured.offsets)) == len(measured.offsets)
        assert np.array_equal(np.sort(measured.offsets), np.arange(measured.offsets.min(), measured.offsets.max() + 1))
        later = [window for window in windows if window.first_scored > window.start + 1]
        assert all(window.stop - window.first_scored == stride for window in later)
    with pytest.raises(ConfigError, match="does not fit the chunk grid"):
        sliding_windows(setting.dataset, CHUNK + 1)


def test_a_window_is_of_the_document_in_the_middle_of_what_it_scores(setting: Setting) -> None:
    windows = sliding_windows(setting.dataset, CHUNK)
    file = setting.dataset.sources[0].samples.file
    found = window_documents(setting.dataset, of_model(setting, windows, "none", 3))
    middles = [(window.first_scored + window.stop) // 2 for window in windows]
    assert found.tolist() == [file.document_of(middle) for middle in middles] and len(set(found.tolist())) > 2


def test_few_windows_are_of_all_parts_of_the_text(setting: Setting) -> None:
    windows = sliding_windows(setting.dataset, CHUNK)
    assert spread(windows, None) == spread(windows, 10**6) == windows
    for count in (1, 2, 7):
        chosen = [windows.index(window) for window in spread(windows, count)]
        assert len(chosen) == count and chosen[0] == 0 and chosen == sorted(set(chosen))
        assert all(abs(place - number * len(windows) / count) < 1 for number, place in enumerate(chosen))


@pytest.mark.parametrize("variant", ["real", "none"])
def test_losses_are_those_of_a_forward_per_token(setting: Setting, variant: str) -> None:
    """Each token alone: a fresh forward of its window up to it, the softmax in float64."""
    module = setting.model.module
    windows = sliding_windows(setting.dataset, 2 * CHUNK)[:3]
    measured = of_model(setting, windows, variant, 2)
    stream = setting.dataset.sources[0].samples.file.stream
    for number in range(0, len(measured.losses), 7):
        window, offset = windows[measured.windows[number]], int(measured.offsets[number])
        batch = read_windows(setting.dataset, [window])
        neighbors = batch.to(torch.device("cpu")).neighbors
        tokens = torch.from_numpy(stream[window.start : offset].astype(np.int64))[None]
        with torch.no_grad():
            logits = module(tokens, neighbors if variant == "real" else None)[0, -1].double()
        expected = -functional.log_softmax(logits, -1)[int(stream[offset])].item()
        assert measured.losses[number] == pytest.approx(expected, abs=2e-5)


def test_documents_of_a_window_are_as_apart_as_in_training(setting: Setting) -> None:
    """With the flags, the losses of its second document are those of that document alone; ends predict nothing."""
    file = setting.dataset.sources[0].samples.file
    for window in sliding_windows(setting.dataset, CHUNK):
        begin = file.document_bounds(file.document_of(window.start + window.length - 1))[0]
        if window.start < begin - CHUNK:
            break
    whole = [replace(window, first_scored=window.start + 1)]
    flags = Boundaries(EOD, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    apart = replace(setting, dataset=replace(setting.dataset, boundaries=flags))
    found = of_model(apart, whole, "none", 1)
    assert found.offsets.tolist() == [place for place in range(window.start + 1, window.stop) if place != begin]
    text = torch.from_numpy(file.stream[begin : window.stop].astype(np.int64))
    with torch.no_grad():
        alone = functional.cross_entropy(setting.model.module(text[None, :-1])[0], text[1:], reduction="none")
    assert found.losses[found.offsets > begin] == pytest.approx(alone.numpy(), abs=2e-5)
    together = of_model(setting, whole, "none", 1)
    assert together.offsets.tolist() == list(range(window.start + 1, window.stop))
    assert np.abs(together.losses[together.offsets > begin] - alone.numpy()).max() > 1e-4


@pytest.mark.parametrize("variant", ["random", "shuffled"])
def test_other_neighbors_do_not_depend_on_who_shares_the_forward(setting: Setting, variant: str) -> None:
    """In groups of one too, where a window has no company to take neighbors from."""
    windows = sliding_windows(setting.dataset, CHUNK)[:9]

    def checksums(batch: Microbatch[Tensor]) -> NDArray[np.float32]:
        """In place of losses: what each window reads."""
        assert batch.neighbors is not None
        read = batch.neighbors.tokens_BCKR.flatten(1).numpy().astype(np.int64)
        sums = (read * np.arange(1, read.shape[1] + 1)).sum(1, keepdims=True) % 1009
        return np.broadcast_to(sums, batch.tokens_BS.shape).astype(np.float32)

    def of(variant: str, size: int) -> NDArray[np.float32]:
        found = measure(checksums, setting.dataset, windows, [variant], batch_size=size, device=torch.device("cpu"))
        return found[variant].losses

    alone = of(variant, 1)
    assert np.array_equal(alone, of(variant, 4)) and np.array_equal(alone, of(variant, 9))
    assert np.mean(alone != of("real", 9)) > 0.8


def evaluated(setting: Setting, output: Path, **changes: Any) -> dict[str, Any] | None:
    """What is written, in its own form: null for numbers that are not finite."""
    settings = setting.corpus.settings(load=str(setting.run))
    perplexity = PerplexityConfig(perplexity_batch_size=2, perplexity_stride=CHUNK)
    sections = [*settings, perplexity, EvaluationConfig(eval_output=str(output)), EngineConfig(), WorkersConfig()]
    result = run_perplexity(Settings(sections, settings.origins()).replace(**changes))
    return None if result is None else dict(json.loads(json_text(to_plain(result))))


def test_the_verb_writes_figures_that_add_up(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_retro.evaluation.leakage.ALPHAS", (-1.0, *ALPHAS))  # a level without any chunk
    result = evaluated(setting, tmp_path)
    assert result is not None
    text = (tmp_path / "perplexity.json").read_text()
    assert json.loads(text) == result and "NaN" not in text
    assert to_plain(read_perplexity(tmp_path / "perplexity.json")).keys() == result.keys()
    assert "<h2>Leakage</h2>" in (tmp_path / "perplexity.html").read_text()
    real = result["variants"]["real"]
    assert real["perplexity"] == pytest.approx(math.exp(real["loss"][0]))
    nats = real["loss"][0] * result["tokens"]
    assert real["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"])
    verbatim = result["verbatim"]
    assert verbatim["found"] == verbatim["chunks"] > 0, "each document of this corpus has a twin"
    assert "100.0%" in (tmp_path / "perplexity.html").read_text()
    curve = result["leakage"]
    written = json.loads(text)["leakage"]
    assert written["bits_per_byte"]["real"][0] is None and written["excess"]["none"][0] == [None] * 3
    assert written["bits_per_byte"]["real"][-1] == curve["bits_per_byte"]["real"][-1]
    assert curve["chunks"] == sorted(curve["chunks"])
    assert set(curve["bits_per_byte"]) == {"real", "none", "random", "shuffled"}
    for name, costs in curve["excess"].items():
        bits = zip(curve["bits_per_byte"][name], curve["bits_per_byte"]["real"], costs, strict=True)
        for other, own, (mean, low, high) in bits:
            if other is not None:
                assert mean == pytest.approx(other - own, abs=1e-9) and low <= mean <= high


def p_tuned(setting: Setting, folder: Path, num_virtual: int, base: Path | None = None, **changes: Any) -> Path:
    """A run that tuned virtual tokens beside the model."""
    vocabulary = setting.model.settings[ModelConfig].vocab_size
    stored = setting.corpus.settings(load=str(base or setting.run), vocab_size=vocabulary, **changes)
    peft = PeftConfig(peft_method="p-tuning", num_virtual_tokens=num_virtual, prompt_encoder_hidden_size=8)
    module = Retro(stored[ModelConfig], stored[RetroConfig])
    attach(module, peft)
    initialize(module, seed=1)
    added = {name: one.detach() * 20 for name, one in added_parameters(module).items()}
    settings = Settings([*(section for section in stored if not isinstance(section, PeftConfig)), peft])
    return write_checkpoint(folder, settings, {name: tuple(one.shape) for name, one in added.items()}, added.get, {})


@pytest.mark.parametrize("reads", [False, True])
def test_virtual_tokens_stand_in_front_of_each_window(setting: Setting, tmp_path: Path, reads: bool) -> None:
    """Window by window: virtual tokens and text through the model, neighbours where their chunks now are."""
    count, gate = (2 * CHUNK, 1.0) if reads else (3, 0.0)
    tuned = p_tuned(setting, tmp_path / "tuned", count, retro_attention_gate=gate)
    result = evaluated(setting, tmp_path / "out", load=str(tuned), leakage_neighbors=0)
    assert result is not None and result["variants"].keys() == ({*VARIANTS} if reads else {"real"})
    module, lead = load_model(tuned).module, list(virtual_token_ids(count))
    sums = []
    for window in sliding_windows(setting.dataset, CHUNK):
        batch = read_windows(setting.dataset, [window]).to(torch.device("cpu"))
        tokens, neighbors = batch.tokens_BS, None
        if reads:
            assert batch.neighbors is not None
            found, there = batch.neighbors.tokens_BCKR, batch.neighbors.mask_BCKR
            neighbors = Neighbors(
                torch.cat((found[:, :2], found), 1), torch.cat((torch.zeros_like(there[:, :2]), there), 1)
            )
        with torch.no_grad():
            logits_SV = module(torch.cat((torch.tensor([lead]), tokens), 1), neighbors)[0, count:]
        labels = batch.labels_BS[0]
        losses = functional.cross_entropy(logits_SV, labels, reduction="none")[batch.loss_mask_BS[0]]
        sums.append(float(losses.double().sum()))
    assert result["variants"]["real"]["loss"][0] == pytest.approx(sum(sums) / result["tokens"], abs=1e-5)
    assert result["samples"]["losses"] == pytest.approx(sums, abs=2e-4)
    plain = evaluated(setting, tmp_path / "plain", leakage_neighbors=0)
    assert plain is not None and plain["samples"]["texts"] == result["samples"]["texts"]
    assert np.abs(np.subtract(plain["samples"]["losses"], sums)).max() > 2e-3


def test_the_verb_takes_the_run_s_borders_of_documents(setting: Setting, tmp_path: Path) -> None:
    """On one process and cut; windows count what training counts."""
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    plain, apart = evaluated(setting, tmp_path / "plain"), evaluated(setting, tmp_path / "apart", **flags)
    assert plain is not None and apart is not None
    ends = plain["tokens"] - apart["tokens"]
    file = setting.dataset.sources[0].samples.file
    scored = of_model(setting, sliding_windows(setting.dataset, CHUNK), "none", 4).offsets
    assert ends == int((file.at(scored - 1) == EOD).sum()) > 0
    run_ranks(
        lambda: evaluated(setting, tmp_path / "cut", pipeline_model_parallel_size=2, **flags), 2, initialize=False
    )
    cut = json.loads((tmp_path / "cut/perplexity.json").read_text())
    assert cut["samples"]["losses"] == pytest.approx(apart["samples"]["losses"], abs=2e-3)
    tuned = p_tuned(setting, tmp_path / "tuned", CHUNK)
    with pytest.raises(ConfigError, match="not of each document"):
        evaluated(setting, tmp_path / "out", load=str(tuned), **flags)


def test_virtual_tokens_that_move_the_grid_of_neighbors_are_refused(setting: Setting, tmp_path: Path) -> None:
    tuned = p_tuned(setting, tmp_path / "tuned", CHUNK + 1)
    with pytest.raises(ConfigError, match="off the grid of chunks"):
        evaluated(setting, tmp_path / "out", load=str(tuned))
    learned = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 4 * CHUNK}
    pretrain(setting.corpus.settings(save=str(tmp_path / "learned"), train_iters=1, eval_iters=0, **learned))
    long = p_tuned(setting, tmp_path / "long", CHUNK, tmp_path / "learned", **learned)
    with pytest.raises(ConfigError, match="model's positions"):
        evaluated(setting, tmp_path / "out", load=str(long))


def test_a_model_that_reads_no_neighbors_has_a_curve_over_the_same_chunks(setting: Setting, tmp_path: Path) -> None:
    """The table says what could be copied, read or not: GPT and Retro can be compared level by level."""
    gpt = setting.corpus.settings(save=str(tmp_path / "gpt"), train_iters=2, eval_iters=0, retro_attention_gate=0.0)
    pretrain(gpt)
    curves = []
    for run in (setting.run, tmp_path / "gpt"):
        result = evaluated(setting, tmp_path / run.name / "evaluation", load=str(run))
        assert result is not None
        curves.append(result["leakage"])
    assert curves[0]["chunks"] == curves[1]["chunks"] and curves[0]["chunks"][-1] > 0
    assert set(curves[1]["bits_per_byte"]) == {"real"} and curves[1]["excess"] == {}


def parts_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "perplexity.parts").iterdir()}


def test_workers_and_killed_runs_give_one_result(setting: Setting, tmp_path: Path) -> None:
    """Each block of losses the same bytes, whoever measured it; what is there is not measured again."""
    whole = evaluated(setting, tmp_path / "whole")
    shares = [evaluated(setting, tmp_path / "shared", shard=f"{number}/3") for number in (2, 0)]
    assert shares == [None, None] and not (tmp_path / "shared/perplexity.json").exists()
    some = sorted((tmp_path / "shared/perplexity.parts").iterdir())[0]
    some.unlink()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared/perplexity.parts").iterdir()}
    assert len(first) >= 2
    assert evaluated(setting, tmp_path / "shared") == whole
    assert parts_of(tmp_path / "shared") == parts_of(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    some.write_bytes(b"no losses")
    with pytest.raises(DamagedArtifact, match="holds other losses"):
        evaluated(setting, tmp_path / "shared")


@pytest.mark.parametrize(("tensor", "pipeline", "world_size"), [(1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 1, 4)])
def test_processes_give_the_result_of_one(
    setting: Setting, tmp_path: Path, tensor: int, pipeline: int, world_size: int
) -> None:
    whole = evaluated(setting, tmp_path / "whole")
    assert whole is not None
    cut = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    run_ranks(lambda: evaluated(setting, tmp_path / "cut", **cut), world_size, initialize=False)
    found = json.loads((tmp_path / "cut/perplexity.json").read_text())
    if tensor * pipeline == 1:
        assert found == whole
        return
    wanted, got = parts_of(tmp_path / "whole"), parts_of(tmp_path / "cut")
    assert sorted(got) == sorted(wanted)
    for name, content in wanted.items():
        ours, theirs = (np.frombuffer(data, "<f4") for data in (got[name], content))
        assert np.allclose(ours, theirs, atol=1e-4, rtol=0)
    for variant, facts in whole["variants"].items():
        assert found["variants"][variant]["loss"] == pytest.approx(facts["loss"], abs=1e-5)
