"""`generate`, `evaluate` and `serve` as a launcher starts them on several processes: what one process gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from megatron_retro.cli.main import main
from megatron_retro.testing.processes import run_ranks

LAYOUTS = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 2, 4)]  # tensor, pipeline, processes
PROMPT = "a prompt of forty bytes, or a little more"


def cut(tensor: int, pipeline: int) -> list[str]:
    return ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]


def on_ranks(words: list[str], count: int) -> None:
    assert run_ranks(lambda: main(words), count, initialize=False) == [0] * count


def examples(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "squad1.examples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("tensor", "pipeline", "count"), LAYOUTS)
def test_evaluation_is_that_of_one_process(
    room: Path, squad_file: Path, tmp_path: Path, tensor: int, pipeline: int, count: int
) -> None:
    words = ["evaluate", "squad1", "--load", str(room / "retro"), "--eval-data", str(squad_file)]
    words += ["--eval-max-new-tokens", "8", "--max-sequence-length", "512", "--eval-batch-size", "2", "--device", "cpu"]
    assert main([*words, "--eval-output", str(tmp_path / "one")]) == 0
    on_ranks([*words, *cut(tensor, pipeline), "--eval-output", str(tmp_path / "many")], count)
    assert examples(tmp_path / "many") == examples(tmp_path / "one")
    files = list((tmp_path / "many").glob("squad1.predictions.*"))
    assert len(files) == count // (tensor * pipeline), "one file for each replica"
    for name in ("results.json", "results.txt"):
        assert (tmp_path / "many" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_an_evaluation_goes_on_after_a_signal(
    room: Path, squad_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's warning comes: what is answered is kept, code 75 asks for another start, which asks only the rest."""
    from megatron_retro.evaluation import suite

    words = ["evaluate", "squad1", "--load", str(room / "retro"), "--eval-data", str(squad_file), *cut(1, 2)]
    words += ["--eval-max-new-tokens", "4", "--max-sequence-length", "512", "--eval-batch-size", "2", "--device", "cpu"]
    words += ["--eval-output", str(tmp_path)]
    real = suite.Evaluation._records

    def warned(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    def rank(code: int) -> None:
        if code:
            monkeypatch.setattr(suite.Evaluation, "_records", warned)
        assert main(words) == (code if os.environ["RANK"] == "0" else 0)

    run_ranks(rank, 2, 75, initialize=False)
    (kept,) = tmp_path.glob("*.predictions.*")
    assert len(kept.read_text().splitlines()) == 1 + 2 and not (tmp_path / "results.json").exists()
    run_ranks(rank, 2, 0, initialize=False)
    assert len(kept.read_text().splitlines()) == 1 + 5 and (tmp_path / "results.json").exists()


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_generate_writes_what_one_process_writes(room: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    words = ["generate", "--load", str(room / "retro"), "--retro-index", str(room / "project"), "--prompt", PROMPT]
    words += ["--max-new-tokens", "30", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    on_ranks([*words, *cut(tensor, pipeline), "--output", str(tmp_path / "many")], 2)
    assert json.loads((tmp_path / "many").read_text()) == json.loads((tmp_path / "one").read_text())


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_cut_model_is_served(room: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    """The first rank answers clients, who come together and may leave; a signal ends all ranks well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = ["serve", "--load", str(room / "retro"), "--retro-index", str(room / "project"), "--port", str(port)]
    found: dict[str, Any] = {}

    def ask() -> None:
        try:
            found.update(conversation(port))
        except Exception as error:
            found["error"] = repr(error)
        os.kill(os.getpid(), signal.SIGTERM)

    def rank() -> dict[str, Any]:
        if os.environ["RANK"] == "0":
            threading.Thread(target=ask, daemon=True).start()
        assert main([*serve, *cut(tensor, pipeline), "--device", "cpu"]) == 0
        return found

    answers = run_ranks(rank, 2, initialize=False)[0]
    assert "error" not in answers, answers
    alone = ["generate", "--load", str(room / "retro"), "--retro-index", str(room / "project"), "--prompt", PROMPT]
    assert main([*alone, "--max-new-tokens", "30", "--device", "cpu", "--output", str(tmp_path / "one")]) == 0
    expected = json.loads((tmp_path / "one").read_text())
    assert answers["texts"] == [expected["text"]] * 3
    assert [chunk["query_stop"] for chunk in answers["chunks"]] == [one["query_stop"] for one in expected["chunks"]]
    assert json.loads(answers["held"]) in ({"color": "red"}, {"color": "blue"})
    assert answers["status"] == "ok"


def conversation(port: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(url + "/health")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30)
    body: Any = {"model": "retro", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    with httpx.stream("POST", url + "/v1/completions", json={**body, "max_tokens": 900, "stream": True}) as leaving:
        next(leaving.iter_lines())
    answer = client.completions.create(**body, n=2, extra_body={"retrieval": True})
    again = client.completions.create(**body)
    messages: Any = [{"role": "user", "content": "Hi"}]
    content = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
    content["additionalProperties"] = False
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": content}}
    held = client.chat.completions.create(model="retro", messages=messages, response_format=wanted, max_tokens=30)
    chunks = answer.choices[0].retrieval  # type: ignore[attr-defined]
    texts = [choice.text for choice in (*answer.choices, *again.choices)]
    status = httpx.get(url + "/health").json()["status"]
    return {"texts": texts, "chunks": chunks, "held": held.choices[0].message.content, "status": status}
