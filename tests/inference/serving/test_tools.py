"""Tools through the official client: a service whose model writes calls, freely or because it has to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from torch import Tensor

from megatron_retro.config.inference import ServeConfig
from megatron_retro.data.instructions.templates import JinjaTemplate
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.inference.chat_format import ChatFormat
from megatron_retro.inference.engine import EngineLimits
from megatron_retro.inference.forward import LocalForward
from megatron_retro.inference.neighbor_sources import RetrievedNeighbors
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.model.cache import Cache
from megatron_retro.model.retro import Retro
from tests.data.instructions.chat_templates import PUBLISHED
from tests.inference.serving.conftest import random_model, start

pytest.importorskip("llguidance")
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bonn", "Köln"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
ASKED: Any = {"model": "small", "messages": [{"role": "user", "content": "Rain?"}], "max_tokens": 100, "seed": 1}
WRITTEN = {
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>',
    "llama3_1": '{"name": "weather", "parameters": {"city": "Köln"}}',
    "mistral_v3_tekken": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Köln"}}]',
}


class RecitingForward(LocalForward):
    """A random model that can only write `text`; with none it writes what it likes."""

    def __init__(self, model: Retro) -> None:
        super().__init__(model)
        self.text, self._start = "", -1

    def recite(self, text: str) -> None:
        self.text, self._start = text, -1

    def next_logits(self, tokens_B: Sequence[int], found: Sequence[RetrievedNeighbors | None], cache: Cache) -> Tensor:
        lengths = list(cache.lengths)
        logits_BV = super().next_logits(tokens_B, found, cache)
        if self.text:
            script = [*self.text.encode(), ByteTokenizer.eod]
            self._start = lengths[0] if self._start < 0 else self._start
            for row, length in enumerate(lengths):
                logits_BV[row, script[min(max(length - self._start, 0), len(script) - 1)]] += 1e4
        return logits_BV


@pytest.fixture(scope="module", params=WRITTEN)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[openai.OpenAI, RecitingForward, str]]:
    """A service with a published template."""
    forward = RecitingForward(random_model())
    form = ChatFormat(JinjaTemplate(PUBLISHED[request.param], request.param, {"bos_token": "", "eos_token": ""}))
    generator = TextGenerator(forward, ByteTokenizer(), EngineLimits(4, 4096, 4096))
    running, thread = start(generator, ServeConfig(port=0), chat_format=form)
    client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
    yield client, forward, WRITTEN[request.param]
    running.server.should_exit = True
    thread.join(timeout=20)


def test_a_call_is_read_and_its_result_goes_back(served: tuple[openai.OpenAI, RecitingForward, str]) -> None:
    client, forward, written = served
    forward.recite(written)
    answer = client.chat.completions.create(**ASKED, tools=TOOLS).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    forward.recite("It pours.")
    more = [*ASKED["messages"], answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    last = client.chat.completions.create(**{**ASKED, "messages": more}, tools=TOOLS).choices[0]
    assert last.finish_reason == "stop" and last.message.content == "It pours." and last.message.tool_calls is None


def test_calls_are_streamed(served: tuple[openai.OpenAI, RecitingForward, str]) -> None:
    client, forward, written = served
    said = "" if written.startswith("{") else "Let me <look> it [up]. "
    forward.recite(said + written)
    with client.chat.completions.stream(**ASKED, tools=TOOLS) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion().choices[0]
    assert answer.finish_reason == "tool_calls" and "".join(texts).strip() == said.strip()
    (call,) = answer.message.tool_calls or ()
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Köln"}
    forward.recite('{"a": [1]} is <tool JSON [TOOL')
    chunks = client.chat.completions.create(**ASKED, tools=TOOLS, stream=True)
    whole = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole == forward.text


def test_a_call_may_be_required_and_named(served: tuple[openai.OpenAI, RecitingForward, str]) -> None:
    """The model writes what it likes where the form leaves it a choice."""
    client, forward, _ = served
    forward.recite("")
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice=choice, temperature=2.0).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or ()
        assert call.type == "function" and call.function.name in ("weather", "now")
        arguments = json.loads(call.function.arguments)
        assert arguments == {} if call.function.name == "now" else arguments["city"] in ("Bonn", "Köln")
    assert call.function.name == "weather"


def test_with_none_nothing_is_offered(served: tuple[openai.OpenAI, RecitingForward, str]) -> None:
    client, forward, written = served
    forward.recite(written)
    without = client.chat.completions.create(**ASKED)
    answer = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice="none")
    assert answer.usage == without.usage
    assert answer.choices[0].message.content == written and answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "not among the tools: weather, now"),
        ({"response_format": {"type": "json_object"}}, "leave one of them out"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id belongs to the role tool"),
        ({"messages": [{"role": "assistant"}]}, "content is missing"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], words: str, served: tuple[openai.OpenAI, RecitingForward, str]
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served[0].chat.completions.create(**{**ASKED, "tools": TOOLS, **changes})
