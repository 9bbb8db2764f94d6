"""Finished models trained on conversations: whole or beside, learned by heart, resumed, and nothing else moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.config.sections import FINETUNING_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.config.training import LORA_TARGETS, PARTS
from megatron_retro.errors import ArtifactError, ConfigError, Requeue
from megatron_retro.peft.attach import is_added
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, index_reads, losses, stored_tensors
from megatron_retro.training.program import finetune, pretrain

WORDS = ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
METHODS: dict[str, dict[str, Any]] = {
    "whole": {"lr": 1e-2},
    "lora": {"peft_method": "lora", "peft_parts": PARTS, "lora_targets": LORA_TARGETS, "lora_rank": 16, "lr": 3e-2},
    "adapter": {"peft_method": "adapter", "peft_parts": PARTS, "adapter_size": 32, "lr": 3e-2},
    "p-tuning": {"peft_method": "p-tuning", "num_virtual_tokens": 16, "prompt_encoder_hidden_size": 64, "lr": 3e-2},
    "ia3": {"peft_method": "ia3", "peft_parts": PARTS, "lr": 1e-1},
}


@pytest.fixture(scope="module")
def base(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Retro that has seen some text."""
    run = tmp_path_factory.mktemp("base") / "run"
    pretrain(corpus.settings(save=str(run), train_iters=40, eval_iters=0, init_method_std=0.2))
    return run


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two questions with passages and one-word answers."""
    path = tmp_path_factory.mktemp("conversations") / "questions.jsonl"
    with path.open("w") as stream:
        for number in range(32):
            word = WORDS[number % 8]
            record = {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": f"{number}"},
                    {"role": "assistant", "content": word},
                ],
                "contexts": [{"title": "t", "text": word * 3}, {"text": "other"}],
            }
            stream.write(json.dumps(record) + "\n")
    return path


def settings(base: Path, conversations: Path, run: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "load": str(base),
        "save": str(run),
        "instruction_data": [str(conversations)],
        "context_place": "encoder",
        "seq_length": 64,
        "micro_batch_size": 8,
        "global_batch_size": 8,
        "train_iters": 6,
        "lr": 1e-2,
        "lr_decay_style": "constant",
        "weight_decay": 0.0,
        "eval_iters": 0,
        "num_workers": 0,
        "log_interval": 1000,
        **more,
    }
    origins = dict.fromkeys(values, "flag")
    return build_settings(FINETUNING_SECTIONS, values, origins)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_where_the_unbroken_one_ends(
    base: Path, conversations: Path, tmp_path: Path, method: str
) -> None:
    rows = {"pack_examples": True, "bucket_by_length": method == "lora"}
    finetune(settings(base, conversations, tmp_path / "whole", **rows, **METHODS[method]))
    stopped = settings(base, conversations, tmp_path / "parts", exit_interval=4, **rows, **METHODS[method])
    with pytest.raises(Requeue):
        finetune(stopped)
    finetune(stopped)
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


@pytest.mark.parametrize("rows", ["pack_examples", pytest.param("bucket_by_length", marks=pytest.mark.full)])
def test_ranks_that_share_rows_learn_what_one_learns(
    base: Path, conversations: Path, tmp_path: Path, rows: str
) -> None:
    """Conversations begin and end anywhere in a row, each with passages of its own; shared rows may be longer."""
    more = {"seq_length": 128, "train_iters": 3, rows: True}
    finetune(settings(base, conversations, tmp_path / "one", **more))
    shared = settings(base, conversations, tmp_path / "shared", context_parallel_size=2, **more)
    run_ranks(lambda: finetune(shared), 2, initialize=False, timeout=100)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "whole"])
def test_checkpoints_hold_what_was_added_and_the_base_keeps_its_bits(
    base: Path, conversations: Path, tmp_path: Path, method: str
) -> None:
    before = {name: tensor.clone() for name, tensor in stored_tensors(base).items()}
    finetune(settings(base, conversations, tmp_path / "run", **METHODS[method]))
    stored = stored_tensors(tmp_path / "run")
    assert any(is_added(name) for name in stored)
    assert all(is_added(name) for name in stored if not name.startswith("random."))
    after = stored_tensors(base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["whole", "lora"])
def test_the_first_rank_alone_reads_the_index_of_the_base(
    base: Path, conversations: Path, tmp_path: Path, method: str
) -> None:
    def started() -> int:
        with index_reads() as read:
            cut = {"train_iters": 1, "micro_batch_size": 4}
            finetune(settings(base, conversations, tmp_path / "run", **cut, **METHODS[method]))
        return len(read)

    assert run_ranks(started, 2, initialize=False) == [1, 0]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("p-tuning", "ia3")])
def test_thirty_two_examples_begin_to_be_learned(base: Path, conversations: Path, tmp_path: Path, method: str) -> None:
    finetune(settings(base, conversations, tmp_path / "run", train_iters=60, **METHODS[method]))
    found = losses(tmp_path / "run")
    assert found[-1] < 0.6 * found[0], f"{found[0]:.3f} -> {found[-1]:.3f}"


@pytest.mark.parametrize("method", ["p-tuning", "ia3"])
def test_a_few_numbers_in_the_right_places_learn(base: Path, conversations: Path, tmp_path: Path, method: str) -> None:
    """Sixteen vectors, or factors alone, hardly steer a model this small; the loss of the same batches falls."""
    finetune(settings(base, conversations, tmp_path / "run", train_iters=40, **METHODS[method]))
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) < sum(found[:4]) - 0.1, f"{found[:4]} -> {found[-4:]}"


BY_HEART: dict[str, dict[str, Any]] = {
    "whole": {"lr": 5e-3, "train_iters": 100},
    "lora": {**METHODS["lora"], "lr": 1e-2, "train_iters": 150},
    "series adapter": {**METHODS["adapter"], "lr": 1e-2, "train_iters": 150},
    "parallel adapter": {**METHODS["adapter"], "adapter_parallel": True, "lr": 1e-2, "train_iters": 150},
    "p-tuning": {**METHODS["p-tuning"], "num_virtual_tokens": 8, "lr": 1e-2, "train_iters": 250},
    "ia3": {**METHODS["ia3"], "train_iters": 150},
}


def thirty_two(path: Path, answers: dict[str, int]) -> Path:
    """Questions with two answers each; the system turn may tell which is meant, the passages name both."""
    with path.open("w") as stream:
        for system, chosen in answers.items():
            for number in range(32):
                words = (WORDS[number % 8], WORDS[(3 * number + 1) % 8])
                turns = {"system": system, "user": str(number), "assistant": words[chosen]}
                messages = [{"role": role, "content": text} for role, text in turns.items()]
                stream.write(json.dumps({"messages": messages, "contexts": [*words]}) + "\n")
    return path


@pytest.fixture(scope="module", params=["gpt", "retro"])
def knowing(request: pytest.FixtureRequest, corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT or a Retro that knows both answers to every question."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    retro = request.param == "retro"
    shape = {"hidden_size": 64, "init_method_std": 0.05}
    pretrain(corpus.settings(retro=retro, save=str(folder / "fresh"), train_iters=1, eval_iters=0, **shape))
    taught = thirty_two(folder / "both.jsonl", {"first": 0, "second": 1})
    finetune(by_heart(folder / "fresh", taught, folder / "run", lr=5e-3, train_iters=400, lr_decay_style="linear"))
    assert losses(folder / "run")[-1] < 0.02
    return folder / "run"


def by_heart(base: Path, conversations: Path, run: Path, **more: Any) -> Settings:
    place = "encoder" if base.parent.name.startswith("retro") else "none"
    steps = {"micro_batch_size": 32, "global_batch_size": 32, "bucket_by_length": True, "context_place": place}
    return settings(base, conversations, run, **steps, **more)


@pytest.mark.full
@pytest.mark.parametrize("method", BY_HEART)
def test_thirty_two_examples_are_learned_by_heart(knowing: Path, tmp_path: Path, method: str) -> None:
    """To less than 0.05 nats per token and 5 % of the loss at first, on a GPT and on a Retro.

    Asked in a third way, the model cannot know which answer is meant; a prompt or a few factors can tell it.
    """
    finetune(
        by_heart(knowing, thirty_two(tmp_path / "asked.jsonl", {"which": 1}), tmp_path / "run", **BY_HEART[method])
    )
    found = losses(tmp_path / "run")
    assert found[0] > 0.2
    assert found[-1] < min(0.05, 0.05 * found[0]), f"{found[0]:.4f} -> {found[-1]:.4f}"


def test_the_gate_off_is_the_published_way(base: Path, conversations: Path, tmp_path: Path) -> None:
    off = {"retro_attention_gate": 0.0, "context_place": "prompt", "seq_length": 96}
    finetune(settings(base, conversations, tmp_path / "run", **off))
    before, after = stored_tensors(base), stored_tensors(tmp_path / "run")
    moved = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
    assert moved
    assert not any("cross" in name or name.startswith("model.encoder.") for name in moved)


def test_a_run_goes_on_with_the_method_that_it_began_with(base: Path, conversations: Path, tmp_path: Path) -> None:
    tuned = {"train_iters": 1, "peft_method": "lora", "lora_rank": 4}
    finetune(settings(base, conversations, tmp_path / "run", **tuned))
    with pytest.raises(ArtifactError, match="--lora-rank: 4 there, 8 here"):
        finetune(settings(base, conversations, tmp_path / "run", **{**tuned, "lora_rank": 8}))
    with pytest.raises(ArtifactError, match="--peft-method: 'lora' there, 'none' here"):
        finetune(settings(base, conversations, tmp_path / "run", train_iters=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retro_attention_gate": 0.0}, "--context-place = 'encoder'"),
        ({"freeze_decoder": True, "peft_method": "lora"}, "--freeze-decoder = True"),
        ({"bucket_by_length": True, "rampup_batch_size": (8, 8, 64)}, "--bucket-by-length needs steps of one size"),
        ({"peft_method": "ia3", "peft_parts": ("encoder",), "context_place": "none"}, "nothing would be trained"),
        ({"hidden_size": 48}, "has another shape"),
        ({"instruction_data": ["3", "a.jsonl", "b.jsonl"]}, "--instruction-data mixes weights and paths"),
        ({"instruction_data": None}, "--instruction-data is not set"),
    ],
)
def test_impossible_wishes_are_named(
    base: Path, conversations: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(settings(base, conversations, tmp_path / "run", **change))
