"""lm-eval's own machinery asks a converted model what it asks the same model of transformers, and hears the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.cli.main import main
from megatron_retro.errors import ConfigError
from megatron_retro.testing.processes import run_ranks
from tests.data.byte_level import save_byte_level
from tests.data.instructions.chat_templates import CHATML

lm_eval = pytest.importorskip("lm_eval")
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QUESTIONS = [
    {"question": f"What is {first} and {second}?", "choices": [" a lot", f" {first + second}", " -"], "gold": 1}
    for first, second in [(1, 2), (30, 4), (5, 600), (7, 8)]
]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    "begin": {  # without a context: what begins a text stands there
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question * 5}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "num_beams": 1},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer begins each text with a token of its own."""
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("lm-eval") / "theirs"
    backend = save_byte_level(made)
    begin = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(made)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, **SHAPE, bos_token_id=begin, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(made)
    assert main(["convert", str(made), str(made.parent / "ours")]) == 0
    return made


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import yaml
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
    (tmp_path / "tasks").mkdir()
    for name, about in TASKS.items():
        content = {"task": f"here_{name}", "test_split": "test", **source, **about}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    yield TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)


def answers_of(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What a model answered to every request of every task."""
    samples = results["samples"]
    return {
        task: [one["filtered_resps"] for one in sorted(samples[task], key=lambda x: x["doc_id"])] for task in samples
    }


@pytest.mark.parametrize("chat", [False, True])
def test_it_hears_what_it_hears_from_transformers(folder: Path, tasks: Any, chat: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    from megatron_retro.inference.lm_eval_adapter import MegatronRetroLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=64, batch_size=1)
    ours = MegatronRetroLM(load=str(folder.parent / "ours"), max_length=64, batch_size=3, device="cpu", dtype="fp32")
    asked = {"tasks": [f"here_{name}" for name in TASKS], "task_manager": tasks, "apply_chat_template": chat}
    expected, found = (answers_of(lm_eval.simple_evaluate(one, log_samples=True, **asked)) for one in (theirs, ours))
    assert expected.keys() == found.keys() == set(asked["tasks"])
    assert found["here_write"] == expected["here_write"] and any(answer[0] for answer in found["here_write"])
    for name in ("here_choose", "here_begin", "here_read"):
        for mine, other in zip(found[name], expected[name], strict=True):
            assert numbers(mine) == pytest.approx(numbers(other), abs=1e-4), name


def test_two_processes_answer_as_one_does(room: Path, tasks: Any) -> None:
    """A Retro with its index: two replicas share the questions, or two processes share the model."""
    from megatron_retro.inference.lm_eval_adapter import MegatronRetroLM

    given = {"load": str(room / "retro"), "retro_index": str(room / "project"), "max_length": 64, "device": "cpu"}
    asked = {"tasks": [f"here_{name}" for name in TASKS], "task_manager": tasks, "log_samples": True}

    def answered(tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
        cut = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        return lm_eval.simple_evaluate(MegatronRetroLM(**given, **cut), **asked)

    alone = answered()
    expected = answers_of(alone)
    for layout in ((1, 1), (2, 1), (1, 2)):
        found, nothing = run_ranks(answered, 2, *layout, initialize=False)
        assert nothing is None, "one process writes"
        mine = answers_of(found)
        assert mine.keys() == expected.keys() and mine["here_write"] == expected["here_write"]
        for name in ("here_choose", "here_begin", "here_read"):
            for one, other in zip(mine[name], expected[name], strict=True):
                assert numbers(one) == pytest.approx(numbers(other), abs=1e-3), (layout, name)
        assert found["results"]["here_choose"]["acc,none"] == alone["results"]["here_choose"]["acc,none"]


def numbers(answer: Any) -> list[float]:
    """Log-probabilities, and whether each was the greedy choice, of an answer of any kind."""
    if isinstance(answer, (list, tuple)):
        return [number for part in answer for number in numbers(part)]
    return [float(answer)]


def test_a_generation_argument_that_would_change_something_is_refused(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from megatron_retro.inference.lm_eval_adapter import MegatronRetroLM

    adapter = MegatronRetroLM(load=str(folder.parent / "ours"), max_length=64, device="cpu")
    with pytest.raises(ConfigError, match="not supported: num_beams"):
        adapter.generate_until([Instance("generate_until", {}, ("Once", {"num_beams": 4}), 0)])
    with pytest.raises(ConfigError, match="no such model argument: beams"):
        MegatronRetroLM(load="anywhere", beams=4)
