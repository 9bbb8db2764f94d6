"""What uses a model and writes: tuning beside it, Megatron core's format, evaluation, a report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_retro.config.model import RetroConfig
from megatron_retro.testing.retrieval_projects import CHUNK
from tests.faults.kills import Stage
from tests.faults.stages import bytes_of, import_verbs, ran, state, training_words, write_model

_RETRO = RetroConfig(retro_add_retriever=True, retro_layers=(2,), retro_chunk_length=CHUNK)
_TUNING = "--peft-method lora --seq-length 320 --micro-batch-size 2 --global-batch-size 2 --train-iters 4 --lr 1e-2"
_CLOCKS = re.compile(rb'"(seconds|written_at|time)": [^,}\n]*|\d+(\.\d+)? ?m?s\b|\d{4}-\d\d-\d\d[^<"]*')


def write_later_stages(folder: Path, project: Path) -> list[Stage]:
    """All of them; `project` is a folder with a corpus and its neighbours."""
    import_verbs("finetune", "convert", "evaluate", "report")
    return [tuning(folder / "tuning"), *core_conversions(folder / "core"), *reading(folder / "reading", project)]


def tuning(folder: Path) -> Stage:
    """LoRA beside a finished Retro."""
    folder.mkdir(parents=True)
    write_model(folder / "base", _RETRO, max_position_embeddings=512)
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "that"}]
    lines = [json.dumps({"messages": turns, "contexts": [{"text": f"that is {n}"}]}) for n in range(8)]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def words(folder: Path) -> list[str]:
        paths = ["--load", f"{folder}/base", "--save", f"{folder}/run", "--context-place", "encoder"]
        data = ["--instruction-data", f"{folder}/questions.jsonl", "--save-interval", "2", "--eval-iters", "0"]
        return ["finetune", *paths, *data, *_TUNING.split(), "--num-workers", "0"]

    return Stage("finetune: LoRA", folder, words, state)


def core_conversions(folder: Path) -> list[Stage]:
    """To the format of Megatron core, and back."""
    (folder / "export").mkdir(parents=True)
    write_model(folder / "export/run", RetroConfig(), hidden_size=256, num_layers=4)
    (folder / "import").mkdir()

    def export(folder: Path) -> list[str]:
        return ["convert", f"{folder}/run", f"{folder}/out", "--convert-to", "megatron-core"]

    def convert(folder: Path) -> list[str]:
        return ["convert", f"{folder}/theirs", f"{folder}/out", "--tokenizer-type", "ByteTokenizer"]

    tensors = ("out/release/*.distcp", "out/release/*.json", "out/*")  # torch's own index holds random names
    ran(["convert", f"{folder}/export/run", f"{folder}/import/theirs", "--convert-to", "megatron-core"])
    return [
        Stage("convert: to Megatron core", folder / "export", export, bytes_of(*tensors), once="out"),
        Stage("convert: from Megatron core", folder / "import", convert, bytes_of("out/*/*"), once="out/latest.json"),
    ]


def reading(folder: Path, project: Path) -> list[Stage]:
    """Held-out text measured, and the page of the run; times are left out of what is compared."""
    shutil.copytree(project, folder / "evaluate")
    ran(training_words(folder / "evaluate"))

    def evaluate(folder: Path) -> list[str]:
        return ["evaluate", "perplexity", "--load", f"{folder}/run", "--eval-output", f"{folder}/run/evaluation"]

    def report(folder: Path) -> list[str]:
        return ["report", f"{folder}/run", "--report-output", f"{folder}/page.html"]

    shutil.copytree(folder / "evaluate", folder / "report")
    ran(evaluate(folder / "report"))

    def timeless(pattern: str) -> Callable[[Path], bytes]:
        read = bytes_of(pattern)
        return lambda folder: _CLOCKS.sub(b"", read(folder).replace(str(folder).encode(), b"FOLDER"))

    return [
        Stage("evaluate: perplexity", folder / "evaluate", evaluate, timeless("run/evaluation/*")),
        Stage("report", folder / "report", report, timeless("page.html")),
    ]
