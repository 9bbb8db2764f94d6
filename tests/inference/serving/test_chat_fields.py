"""Fields of OpenAI's chat requests: what is done, what is taken, and what is refused in words."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest


def test_openai_client_chat_logprobs_and_biases(service: Any) -> None:
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    taken: Any = {"metadata": {"a": "b"}, "service_tier": "auto", "response_format": {"type": "text"}}
    answer = client.chat.completions.create(**asked, **taken, logprobs=True, top_logprobs=20).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    for one in answer.logprobs.content:
        assert len(one.top_logprobs) == 20 and one.token == one.top_logprobs[0].token  # greedy
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    alone = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
    assert alone is not None and alone.content is not None and not alone.content[0].top_logprobs
    forced = client.chat.completions.create(**asked, logit_bias={"97": 100}).choices[0].message.content
    assert forced == "a" * 8


def test_openai_client_responses(service: Any) -> None:
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "small", "temperature": 0, "max_output_tokens": 8}
    answer = client.responses.create(**asked, input="Hi", instructions="Be brief.", store=False)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model="small", temperature=0, max_tokens=8, messages=messages)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens and answer.usage.output_tokens == 8
    history: Any = [{"role": "user", "content": "Hi"}, *answer.output, {"role": "user", "content": "More"}]
    assert client.responses.create(**asked, input=history).output_text
    for more in ({"store": True}, {"previous_response_id": "resp_1"}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match="send the conversation in input"):
            client.responses.create(**asked, input="Hi", **more)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools need a chat template"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, "not among the tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs to the type"),
        ({"logprobs": True, "stream": True}, "leave stream out"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ],
)
def test_what_a_chat_cannot_do_is_said(service: Any, extra: dict[str, Any], words: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **extra}
    answer = httpx.post(service.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
