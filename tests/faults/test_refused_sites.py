"""What the system refuses at each site of the verbs that build, train and use a model: one message, code 2, no half.

Every kind of call (open, read, write, sync) on every file that a verb meets is a site; under `--full` each refuses with
each error, by default a few with one. The verb is then started again and must end with the bytes of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_retro.config.model import RetroConfig
from megatron_retro.testing.retrieval_projects import CHUNK
from tests.faults import sites, stages
from tests.faults.test_refusals import CODES, shim  # noqa: F401

QUICK = 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with its project, and a small Retro."""
    folder = tmp_path_factory.mktemp("sites") / "world"
    stages.build(folder.parent / "build")
    shutil.copytree(folder.parent / "build/query/ready", folder)
    retro = RetroConfig(retro_add_retriever=True, retro_layers=(2,), retro_chunk_length=CHUNK)
    stages.write_model(folder / "run", retro)
    stages.write_model(folder / "gpt", RetroConfig())
    return folder


MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --num-workers 0"
STEPS = "--micro-batch-size 2 --global-batch-size 2 --train-iters 2 --eval-iters 0"
ANSWER = "--max-new-tokens 4 --max-sequence-length 60 --no-stream"


def words_of(verb: str, folder: Path) -> list[str]:
    corpus, project, out = (str(folder / name) for name in ("corpus", "project", "out"))
    data = ["--data-path", corpus, "--neighbor-path", f"{project}/neighbors/corpus"]
    data += ["--database-path", f"{project}/database", "--split", "80,20,0"]
    retro = ["--retro-add-retriever", "--retro-layers", "2", "--retro-chunk-length", str(CHUNK)]
    load, live = ["--load", f"{folder}/run"], ["--retro-index", project]
    prompt = ["--prompt", "abc" * 12, *ANSWER.split(), "--output", f"{out}/answers"]
    return {
        "build-retrieval": [*stages.build_words(folder, "train", project=out), "encode", "merge", "query"],
        "pretrain": ["pretrain", *data, *MODEL.split(), *STEPS.split(), *retro, "--save", out],
        "export": ["convert", f"{folder}/gpt", out, "--convert-to", "huggingface"],
        "generate": ["generate", *load, *live, *prompt],
        "evaluate": ["evaluate", "perplexity", *load, *data, "--seq-length", "64", "--eval-output", out],
        "serve": ["serve", *load, *live, "--port", "0"],
    }[verb]


@pytest.mark.parametrize(
    "verb",
    [
        "export",
        *(pytest.param(verb, marks=pytest.mark.full) for verb in ("build-retrieval", "pretrain", "generate")),
        *(pytest.param(verb, marks=pytest.mark.full) for verb in ("evaluate", "serve")),
    ],
)
def test_a_refusal_at_any_site(
    verb: str,
    shim: Path,  # noqa: F811
    world: Path,
    tmp_path: Path,
    count: Callable[[int, int], int],
) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    arguments = [str(folder), json.dumps(words_of(verb, folder)), json.dumps(CODES), str(count(QUICK, 0))]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, sites.__file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told, *found = [json.loads(line) for line in done.stdout.splitlines()]
    print(verb, told)
    assert len(found) == told["cases"] > 0
    faults = [fault for case in found if (fault := fault_of(*case))]
    assert not faults, f"{len(faults)} of {told}\n" + "\n".join(faults[:12])


def fault_of(call: str, part: str, code: int, returned: int, said: str, again: str) -> str:
    """What is wrong with the answer to a refusal; nothing where all is well."""
    case = f"{call} of {part}: {os.strerror(code)}: code {returned}, again: {again}\n{said}"
    if returned == 0:
        return "" if again == "same" else case
    one_error = [line[:6] for line in said.splitlines()].count("error:") == 1
    named = os.strerror(code) in said and "fix:" in said and "Traceback" not in said
    return "" if returned == 2 and one_error and named and again in ("", "same") else case
