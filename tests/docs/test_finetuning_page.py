"""Every command of docs/finetuning.md runs, in order, on models of a few thousand parameters."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_retro.cli.main import main
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.retrieval_projects import CHUNK, project_settings
from megatron_retro.testing.tiny_corpus import write_tiny_corpus
from megatron_retro.training.program import pretrain

TEXT = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
LLAMA = {"swiglu": True, "normalization": "RMSNorm", "disable_bias_linear": True}
SMALL = {
    "finetune": "--seq-length 512 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --eval-iters 0"
    " --num-workers 0 --lora-rank 2 --adapter-size 4 --num-virtual-tokens 3 --prompt-encoder-hidden-size 8",
    "generate": "--max-new-tokens 3",
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    corpus = write_tiny_corpus(tmp_path / "tiny")
    pretrain(corpus.settings(save="retro", train_iters=2, eval_iters=0))
    pretrain(corpus.settings(retro=False, save="gpt", train_iters=2, eval_iters=0, **LLAMA))
    tasks = ["train", "encode", "merge", "query"]
    build_retrieval(project_settings(tmp_path / "retrieval", [str(corpus.tokens)], retro_tasks=tasks))
    chat = [{"role": "user", "content": "hello" * CHUNK}, {"role": "assistant", "content": "there"}]
    asked = {"question": "who?", "answers": ["he"], "contexts": [{"title": "t", "text": "he did"}]}
    Path("chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 6)
    Path("qa.jsonl").write_text((json.dumps(asked) + "\n") * 4)
    return tmp_path


def test_every_command_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = commands()
    assert len(listed) > 12 and all(program == "megatron-retro" for program, *_ in listed)
    for _, verb, *words in listed:
        assert main([verb, *words, *SMALL.get(verb, "").split()]) == 0, f"{verb} {words}\n{capsys.readouterr().err}"
    contexts = [json.loads(line)["contexts"] for line in Path("chat_with_passages.jsonl").read_text().splitlines()]
    assert [len(one) for one in contexts] == [2] * 6
    assert (workplace / "adapter-hf" / "adapter_config.json").is_file()
