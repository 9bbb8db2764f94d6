"""Whole tiny runs: pinned losses, observers that change nothing, retro-fitting."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_retro.assembly.retrofitting import collapsed, inherited_settings, parameter_sources
from megatron_retro.checkpoint.loading import open_checkpoint
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.model.gates import AdaptiveGate
from megatron_retro.runtime.launch import find_launch
from megatron_retro.runtime.process_group import process_group
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.testing.layouts import LIKE_LLAMA, random_batches, tiny_settings
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.single_process import one_process
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, index_reads, losses, stored_tensors
from megatron_retro.training import program
from megatron_retro.training.program import pretrain, retrofit

GOLDEN = Path(__file__).parent / "golden_losses.json"
KINDS: dict[str, dict[str, Any]] = {
    "gpt": {"retro": False},
    "gpt bf16": {"retro": False, "bf16": True},
    "llama-like": {"retro": False, **LIKE_LLAMA},
    "retro": {},
    "retro adaptive": {"retro_gate_type": "adaptive", "retro_gate_budget_warmup": 2},
    "retro legacy positions": {"retro_neighbor_positions": "none", "position_embedding_type": "learned_absolute"},
    "retro noisy": {"retro_no_retrieval_probability": 0.2, "retro_random_retrieval_probability": 0.2},
}


def short_run(corpus: TinyCorpus, run: Path, **more: Any) -> list[float]:
    pretrain(corpus.settings(**{"save": str(run), "train_iters": 5, "eval_iters": 0, **more}))
    return losses(run)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_committed_ones(corpus: TinyCorpus, tmp_path: Path, kind: str) -> None:
    """Relative 1e-4 between machines (1e-2 in bf16), and the same bits on one; UPDATE_GOLDEN_LOSSES=1 writes them."""
    first = short_run(corpus, tmp_path / "first", deterministic_mode=True, **KINDS[kind])
    torch.use_deterministic_algorithms(False)
    second = short_run(corpus, tmp_path / "second", **KINDS[kind])
    assert first == second
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN_LOSSES"):
        GOLDEN.write_text(json.dumps({**golden, kind: first}, indent=1) + "\n")
    else:
        assert first == pytest.approx(golden[kind], rel=1e-2 if "bf16" in kind else 1e-4)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_budget_of_gates_is_the_divergence_from_the_target_rate(recompute: str) -> None:
    settings = tiny_settings(
        retro_gate_type="adaptive", retro_gate_budget_weight=0.5, retro_gate_budget_warmup=10,
        retro_gate_target_rate=0.3, global_batch_size=1, recompute_granularity=recompute,
    )  # fmt: skip
    model = one_process(settings, torch.device("cpu"))
    gates = [part for part in model.module.modules() if isinstance(part, AdaptiveGate)]
    for gate in gates:
        torch.nn.init.normal_(gate.weight, std=0.5)
    result = model.train_step(random_batches(settings), step=5, loss_scale=8.0)
    rates = [gate.last_rates.mean() for gate in gates if gate.last_rates is not None]
    assert len(rates) == 2
    expected = sum(0.3 * torch.log(0.3 / rate) + 0.7 * torch.log(0.7 / (1 - rate)) for rate in rates)
    assert result.extra_losses == {"gate budget": pytest.approx(0.5 * 5 / 10 * float(expected), rel=1e-4)}


def test_the_budget_of_gates_is_told_with_every_step(corpus: TinyCorpus, tmp_path: Path) -> None:
    short_run(corpus, tmp_path, retro_gate_type="adaptive", retro_gate_budget_warmup=2)
    told = [step.extra_losses["gate budget"] for step in read_run_log(tmp_path).steps]
    assert told[0] == 0.0 and min(told[1:]) > 0.0


def test_observers_change_no_bit(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    watched = {"tensorboard_dir": str(tmp_path / "board"), "log_interval": 1, "profile": True, "hidden_dropout": 0.1}
    if importlib.util.find_spec("prometheus_client") is not None:
        watched["prometheus_file"] = str(tmp_path / "run.prom")
    watched |= {"profile_step_start": 2, "profile_step_end": 3, "eval_interval": 2, "eval_iters": 1}
    short_run(corpus, tmp_path / "watched", **watched)
    assert list((tmp_path / "board").iterdir()) and (tmp_path / "watched/profile/rank-00000.json").stat().st_size
    assert capfd.readouterr().err.count("tokens/s") == 5
    monkeypatch.setattr(program, "build_observers", lambda parts, launch, heartbeat: [])
    blind = corpus.settings(save=str(tmp_path / "blind"), train_iters=5, eval_iters=0, hidden_dropout=0.1)
    pretrain(blind)
    assert not (tmp_path / "blind/events.jsonl").exists()
    assert differences(tmp_path / "watched", tmp_path / "blind") == []


def test_an_evaluation_is_repeatable_and_moves_no_random_state(corpus: TinyCorpus) -> None:
    from megatron_retro.assembly.run_parts import build_run_parts
    from megatron_retro.training.evaluator import Evaluator

    with process_group(find_launch({})) as device:
        parts = build_run_parts(corpus.settings(hidden_dropout=0.2), ByteTokenizer(), device, 1)
        evaluator = Evaluator(parts)
        before = torch.get_rng_state()
        first, second = evaluator.evaluate(0), evaluator.evaluate(0)
        assert first is not None and second is not None
        assert torch.equal(before, torch.get_rng_state())
        assert first.loss == second.loss and first.samples == second.samples
        assert first.retrieval is not None and first.retrieval == second.retrieval
        assert [use.layer for use in first.retrieval.layers] == [1, 2]
        assert all(use.share > 0 for use in first.retrieval.layers)


def bytes_sent(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and how many bytes this rank handed to collectives in it, those of the model left out."""
    sent = []

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def counting(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            sent.append(tensor.nbytes)
            return collective(tensor, *arguments, **more)

        return counting

    def refused(*arguments: Any, **more: Any) -> None:
        raise AssertionError("an evaluation sends no objects")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("gather", "broadcast", "reduce"):
            patch.setattr(dist, name, counted(getattr(dist, name)))
        patch.setattr(dist, "all_gather_object", refused)
        result = call()
    return result, sum(sent)


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}],
    ids=str,
)
def test_every_layout_measures_the_same_health(corpus: TinyCorpus, layout: dict[str, Any]) -> None:
    """Two data ranks read half of the samples each, random neighbours included; sums of samples travel, no tokens.

    Ranks that share sequences give each other the losses of their tokens, and both the sums of the same samples.
    """
    global_batch, eval_iters, variants = 8, 2, 4

    def health(**more: Any) -> tuple[Any, int]:
        from megatron_retro.assembly.run_parts import build_run_parts
        from megatron_retro.training.evaluator import Evaluator

        launch = find_launch()
        more |= {"global_batch_size": global_batch, "eval_iters": eval_iters}
        with process_group(launch) as device:
            parts = build_run_parts(corpus.settings(**more), ByteTokenizer(), device, launch.world_size)
            record, sent = bytes_sent(lambda: Evaluator(parts).evaluate(0))
            return (None if record is None else record.to_json()), sent

    ((one, _),) = run_ranks(health, 1, initialize=False)
    (cut, _), (other, _) = found = run_ranks(lambda: health(**layout), 2, initialize=False)
    assert other is None, "intervals are drawn on the first rank alone"
    numbers = (
        global_batch * eval_iters * (4 + 2 * variants) + variants * corpus.settings()[RetroConfig].retro_chunk_length
    )
    layers = corpus.settings()[ModelConfig].num_layers
    assert max(sent for _, sent in found) <= 8 * (numbers + 5 * layers)
    assert cut["loss"] == pytest.approx(one["loss"], abs=1e-6)
    cut, one = cut["facts"], one["facts"]
    assert cut["tokens"] == one["tokens"] and cut["samples"]["texts"] == one["samples"]["texts"]
    for variant, interval in one["excess"].items():
        assert cut["excess"][variant] == pytest.approx(interval, abs=1e-5), variant
        assert cut["excess_by_position"][variant] == pytest.approx(one["excess_by_position"][variant], abs=1e-5)
    assert [use["share"] for use in cut["layers"]] == pytest.approx([use["share"] for use in one["layers"]], rel=1e-4)


def test_retrofit_starts_as_the_gpt_and_freezes_what_it_says(
    corpus: TinyCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short_run(corpus, tmp_path / "gpt", retro=False, train_iters=8)
    more = {"save": str(tmp_path / "retro"), "load": str(tmp_path / "gpt"), "train_iters": 3, "eval_iters": 0}
    settings = corpus.settings(freeze_decoder=True, retro_zero_init_output=True, **more)
    retrofit(settings)
    told = capfd.readouterr().err
    assert "layers.{0-1}.cross_attention.query.weight" in told and "fresh       yes" in told
    gpt, retro = stored_tensors(tmp_path / "gpt"), stored_tensors(tmp_path / "retro")
    for name, tensor in gpt.items():
        if name.startswith("model."):
            assert torch.equal(tensor, retro[name]), f"{name} is frozen"
    fresh = [name for name in retro if name.startswith("model.") and name not in gpt]
    assert fresh and all("encoder" in name or "cross_" in name for name in fresh)
    assert not any(name.startswith("optimizer.layers.0.mlp") for name in retro), "no moments of frozen parameters"
    assert any(retro[name].any() for name in retro if name.endswith("layers.0.cross_attention.output.weight"))


def test_the_first_rank_alone_reads_the_index_of_the_gpt(corpus: TinyCorpus, tmp_path: Path) -> None:
    short_run(corpus, tmp_path / "gpt", retro=False, train_iters=1)
    settings = corpus.settings(load=str(tmp_path / "gpt"), train_iters=1, eval_iters=0, retro_init="decoder")

    def started() -> int:
        with index_reads() as read:
            retrofit(settings)
        return len(read)

    assert run_ranks(started, 2, initialize=False) == [2, 0], "for the table of sources, and to load"


def test_the_plan_names_source_and_fate_of_every_parameter(corpus: TinyCorpus, tmp_path: Path) -> None:
    short_run(corpus, tmp_path / "gpt", retro=False, train_iters=1, hidden_size=64)
    checkpoint = open_checkpoint(tmp_path / "gpt")
    settings = inherited_settings(corpus.settings(load=str(tmp_path / "gpt")), checkpoint)
    rows = parameter_sources(settings, checkpoint)
    by_name = {row.parameter: row for row in rows}
    assert by_name["embedding.word.weight"].source == "checkpoint"
    assert by_name["embedding.word.weight"].shape[1] == 64, "the shape comes from the checkpoint"
    assert by_name["encoder.layers.1.mlp.up.weight"].source == "fresh"
    assert all(row.trains for row in rows)
    assert sum(len(expand(row.parameter)) for row in collapsed(rows)) == len(rows)


def expand(name: str) -> list[str]:
    if "{" not in name:
        return [name]
    first, last = name[name.index("{") + 1 : name.index("}")].split("-")
    return [name] * (int(last) - int(first) + 1)


def test_retrofit_refuses_what_cannot_be(corpus: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="retrofit starts from a model"):
        retrofit(corpus.settings())
    with pytest.raises(ArtifactError, match="no complete checkpoint"):
        retrofit(corpus.settings(load=str(tmp_path)))
    with pytest.raises(ConfigError, match="the data has no neighbours"):
        pretrain(corpus.settings(retro=False, retro_add_retriever=True))


def test_a_stop_without_a_place_to_save_says_so(corpus: TinyCorpus) -> None:
    settings = corpus.settings(train_iters=50, eval_iters=0)
    stops = StopRequests(0.0)
    with process_group(find_launch({})) as device:
        outcome = program.train(settings, ByteTokenizer(), find_launch({}), device, stops)
    with pytest.raises(Exception, match="nothing was saved: there is no --save"):
        program.finish(settings, outcome)


def test_a_log_that_repeats_steps_counts_each_once(corpus: TinyCorpus, tmp_path: Path) -> None:
    short_run(corpus, tmp_path / "run")
    events = tmp_path / "run/events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    repeated = [line for line in lines if '"step": 4' in line and '"event": "step"' in line]
    events.write_text("".join([*lines, *repeated, '{"event": "cut by a ki']))
    assert [step.step for step in read_run_log(tmp_path / "run").steps] == [1, 2, 3, 4, 5]
