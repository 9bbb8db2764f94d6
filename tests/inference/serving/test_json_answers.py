"""Answers that are held to JSON: a model of random weights writes what the schema says, alone and beside others; and
long work on a request, which holds up nobody.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from megatron_retro.config.inference import ServeConfig
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.inference.engine import EngineLimits
from megatron_retro.inference.forward import LocalForward
from megatron_retro.inference.grammars import Grammars
from megatron_retro.inference.text_generator import TextGenerator
from tests.inference.serving.conftest import random_model, start

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "color": {"enum": ["red", "blue"]}, "size": {"enum": [1, 22]}},
    "required": ["yes", "color", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def url(generator: TextGenerator) -> Iterator[str]:
    """A service whose model may write every byte."""
    whole = TextGenerator(LocalForward(random_model()), generator.tokenizer, EngineLimits(4, 512, 64))
    running, thread = start(whole, ServeConfig(port=0))
    yield running.url
    running.server.should_exit = True
    thread.join(timeout=20)


def chat(url: str, **more: Any) -> Any:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Hi"}]
    return client.chat.completions.create(model="small", messages=messages, max_tokens=60, **more)


def asked_for(url: str, content: dict[str, Any]) -> httpx.Response:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": content}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": wanted, "max_tokens": 1}
    return httpx.post(url + "/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_follows_its_schema(temperature: float, url: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    answer = chat(url, response_format=wanted, temperature=temperature, n=4, seed=1)
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and list(found) == ["yes", "color", "size"]
        assert isinstance(found["yes"], bool) and found["color"] in ("red", "blue") and found["size"] in (1, 22)


def test_an_object_begins_and_texts_beside_it_are_free(url: str) -> None:
    free = chat(url, temperature=0.0).choices[0].message.content
    assert not free.startswith("{")
    held = chat(url, temperature=0.0, response_format={"type": "json_object"}).choices[0].message.content
    assert held.startswith(("{}", '{"'))
    assert chat(url, temperature=0.0).choices[0].message.content == free


def test_a_schema_that_is_none_is_refused(url: str) -> None:
    answer = asked_for(url, {"type": "objekt"})
    assert answer.status_code == 400 and "response_format has a schema" in answer.json()["error"]["message"]


def test_large_schemas_hold_nobody_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered while a schema is compiled."""
    begun, answered, require = threading.Event(), threading.Event(), Grammars.require

    def slowly(grammars: Grammars, content: dict[str, Any]) -> str:
        begun.set()
        assert answered.wait(30), "the service waits for the schema"
        return require(grammars, content)

    monkeypatch.setattr(Grammars, "require", slowly)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked_for, url, SCHEMA)
        assert begun.wait(30)
        assert httpx.get(url + "/health", timeout=20).json()["status"] == "ok"
        answered.set()
        assert answer.result().status_code == 200
    refused = asked_for(url, {"enum": [f"{number:>9}" for number in range(12_000)]})
    assert refused.status_code == 400 and "too large" in refused.json()["error"]["message"]


class _WaitingTokenizer(ByteTokenizer):
    """Takes its time with the prompt."""

    def __init__(self) -> None:
        self.begun, self.answered = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        self.begun.set()
        assert self.answered.wait(30), "the service waits for the tokens"
        return super().encode(text)


def test_long_prompts_hold_nobody_up() -> None:
    """Others are answered while a prompt is tokenized."""
    tokenizer = _WaitingTokenizer()
    running, thread = start(
        TextGenerator(LocalForward(random_model()), tokenizer, EngineLimits(4, 512, 64)), ServeConfig(port=0)
    )
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, running.url)
        assert tokenizer.begun.wait(30)
        assert httpx.get(running.url + "/health", timeout=20).json()["status"] == "ok"
        assert not answer.done()
        tokenizer.answered.set()
        assert answer.result().choices
    running.server.should_exit = True
    thread.join(timeout=20)
