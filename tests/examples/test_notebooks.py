"""The notebooks and docs/python.md run as they stand, with a random decoder in place of a published one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
TEXTS = [" ".join(f"word{(number * step) % 97}" for step in range(1, 120)) for number in range(1, 41)]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.jsonl`, and `model`: a Llama with a tokenizer that was trained on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special, letters = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters)
    tokenizer.train_from_iterator(TEXTS, trainer)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = LlamaConfig(**size, vocab_size=tokenizer.get_vocab_size(), eos_token_id=0, bos_token_id=0)
    with torch.random.fork_rng():
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_every_cell_runs(name: str, room: Path) -> None:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and all(not cell.get("outputs") for cell in notebook["cells"])
    run_python("\n".join(cells), room, {"MODEL": "model", "TEXT": "text.jsonl", "STEPS": "2", "PROMPT": TEXTS[3][:300]})


def test_the_page_about_python_is_true(room: Path, tmp_path: Path) -> None:
    for name in ("model", "text.jsonl"):
        (tmp_path / name).symlink_to(room / name)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    run_python("\n".join(blocks), tmp_path, {})


def run_python(code: str, folder: Path, settings: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
