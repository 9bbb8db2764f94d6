"""The service as clients meet it: OpenAI's client, plain HTTP, bad input, crowds, clients that leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

PROMPT = "the quick brown fox jumps over the lazy cat and"


def client_of(service: Any, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=service.url + "/v1", api_key=key, max_retries=0, timeout=60)


def post(service: Any, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(service.url + path, json=body, timeout=60)


def head_of(length: int) -> bytes:
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


def test_openai_client_completions(service: Any, generator: Any) -> None:
    client = client_of(service)
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    whole = client.completions.create(model="small", prompt=PROMPT, max_tokens=40, temperature=0)
    direct = generator.generate(
        [PROMPT], max_new_tokens=40, sampling=generator_sampling(), sources=[generator.source("live")]
    )
    assert whole.choices[0].text == direct[0].text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == len(PROMPT)
    stream = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    asked: Any = {"retrieval": True}
    extra = client.completions.create(model="small", prompt=PROMPT, max_tokens=8, extra_body=asked)
    assert extra.choices[0].retrieval[0]["neighbors"][0]["id"] >= 0  # type: ignore[attr-defined]
    assert len(events) > 20 and events[-1].usage is not None and events[-1].usage.total_tokens == len(PROMPT) + 40


def test_openai_client_logprobs(service: Any, generator: Any) -> None:
    """The chances of a lone forward over the whole text, as evaluation clients read them: echo, others, offsets."""
    client = client_of(service)
    asked: Any = {"model": "small", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 3}
    none: Any = {"retrieval_mode": "none"}
    answer = client.completions.create(**asked, echo=True, extra_body=none).choices[0]
    found = answer.logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert "".join(found.tokens) == answer.text and answer.text.startswith(PROMPT)
    assert all(answer.text.startswith(text, at) for text, at in zip(found.tokens, found.text_offset, strict=True))
    tokens = torch.tensor([generator.tokenizer.encode(answer.text)])
    with torch.inference_mode():
        logits_SV = generator.forward.model(tokens)[0]
    letters = torch.zeros(logits_SV.shape[1], dtype=torch.bool)
    letters[[32, *range(97, 123)]] = True  # the fixture's model writes nothing else, but reads everything
    given = len(PROMPT)
    free_SV, bound_SV = logits_SV.log_softmax(-1), logits_SV.masked_fill(~letters, -torch.inf).log_softmax(-1)
    for place in range(1, tokens.shape[1]):
        expected = (free_SV if place < given else bound_SV)[place - 1]
        assert found.token_logprobs[place] == pytest.approx(float(expected[tokens[0, place]]), abs=1e-3)
        assert len(found.top_logprobs[place]) == 3
        assert max(found.top_logprobs[place].values()) == pytest.approx(float(expected.max()), abs=1e-3)
    assert found.token_logprobs[0] is None
    alone = client.completions.create(**{**asked, "logprobs": 0}, extra_body=none).choices[0].logprobs
    assert alone is not None and alone.top_logprobs is None
    assert alone.token_logprobs == pytest.approx(found.token_logprobs[given:], abs=1e-4)
    assert alone.text_offset is not None and alone.text_offset[0] == 0


def generator_sampling() -> Any:
    from megatron_retro.inference.sampling import Sampling

    return Sampling()


def test_openai_client_chat(service: Any) -> None:
    client = client_of(service)
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is a chunk?"}]},
    ]
    whole = client.chat.completions.create(model="small", messages=messages, max_tokens=20, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    events = list(
        client.chat.completions.create(model="small", messages=messages, max_tokens=20, temperature=0, stream=True)
    )
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text.strip() == whole.choices[0].message.content and events[0].choices[0].delta.role == "assistant"


def test_neighbors_come_with_the_answer(service: Any, generator: Any) -> None:
    answer = post(service, prompt=PROMPT, max_tokens=30, temperature=0, retrieval=True).json()
    chunks = answer["choices"][0]["retrieval"]
    text = PROMPT + answer["choices"][0]["text"]
    assert [chunk["query_stop"] for chunk in chunks] == list(range(16, len(text) + 0, 16))
    for chunk in chunks:
        assert chunk["query"] == text[chunk["query_start"] : chunk["query_stop"]]
        assert len(chunk["neighbors"]) == 2
        for neighbor in chunk["neighbors"]:
            tokens, mask = generator.index.database.gather([neighbor["id"]], 32)
            assert neighbor["text"] == generator.tokenizer.decode(tokens[mask].tolist())
    assert "quick brown fox" in chunks[0]["neighbors"][0]["text"] + chunks[0]["neighbors"][1]["text"]
    streamed = []
    with httpx.stream(
        "POST",
        service.url + "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "retrieval": True, "stream": True},
        timeout=60,
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["retrieval"]
    assert streamed == chunks


def test_retrieval_modes(service: Any) -> None:
    texts = {
        mode: post(service, prompt=PROMPT, max_tokens=60, temperature=0, retrieval_mode=mode).json()["choices"][0][
            "text"
        ]
        for mode in ("live", "none", "random")
    }
    assert len(set(texts.values())) == 3
    given = post(service, prompt=PROMPT, max_tokens=20, temperature=0, passages=["a given text"], retrieval=True).json()
    neighbors = [chunk["neighbors"] for chunk in given["choices"][0]["retrieval"]]
    expected = {"id": -1, "distance": None, "text": "a given text", "attention": None, "worth": None}
    assert all(found == [expected] for found in neighbors)


def test_several_texts_and_seeds(service: Any) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 12, "temperature": 1.0, "seed": 7, "echo": True}
    first, again = post(service, **body).json(), post(service, **body).json()
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"] and len(set(texts)) == 4
    tokens = post(service, prompt=list(b"one"), max_tokens=12, temperature=1.0, seed=7).json()["choices"][0]["text"]
    assert "one" + tokens == texts[0]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "temprature": 1}, 400, "temprature"),
        ({"prompt": "x" * 600, "max_tokens": 4}, 400, "too long"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [300]}, 400, "does not know"),
        ({"prompt": "x", "model": "other"}, 404, "no model"),
        ({"prompt": ["x"] * 9, "n": 2}, 400, "more than 16"),
        ({"prompt": "x", "retrieval_step": 17}, 400, "retrieval step"),
        ({"prompt": "x", "retrieval_step": 2, "attention": True}, 400, "a retrieval step of 2"),
        ({"prompt": "x", "logprobs": 6}, 400, "logprobs"),
        ({"prompt": "x", "logprobs": 1, "stream": True}, 400, "leave stream out"),
        ({}, 400, "prompt"),
    ],
)
def test_bad_requests(service: Any, body: dict[str, Any], status: int, words: str) -> None:
    answer = post(service, **body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_bad_bytes(service: Any) -> None:
    url = service.url + "/v1/completions"
    assert httpx.post(url, content=b"{not json", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(url, content=b"\xff\xfe", headers={"content-type": "application/json"}).status_code == 400
    half = b'{"prompt": "\\ud800", "max_tokens": 3}'
    assert httpx.post(url, content=half, headers={"content-type": "application/json"}).status_code == 400
    big = b'{"prompt": "' + b"x" * (10 << 20) + b'"}'
    assert httpx.post(url, content=big, headers={"content-type": "application/json"}).status_code == 413

    def unannounced() -> Any:
        yield from (b"x" * 65536 for _ in range(160))

    try:
        answer = httpx.post(url, content=unannounced(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.TransportError:
        pass  # the connection may be closed before all was sent
    assert httpx.get(service.url + "/nothing").status_code == 404
    assert httpx.get(url).status_code == 405
    assert httpx.get(service.url + "/health").json()["status"] == "ok"


def test_what_is_wrong_is_said_in_words(service: Any) -> None:
    url, kind = service.url + "/v1/completions", {"content-type": "application/json"}
    message = httpx.post(url, content=b"{not json", headers=kind).json()["error"]["message"]
    assert message.startswith("body: no JSON at character 1")
    error = post(service, prompt={"a": 1}).json()["error"]
    assert error["param"] == "prompt"
    assert "valid string; or Input should be a valid list" in error["message"]


def test_null_is_absent(service: Any) -> None:
    """Clients send it for what they do not set, known here or not."""
    answer = post(service, prompt="x", max_tokens=2, temperature=None, logit_bias=None, suffix=None, stop=None)
    assert answer.status_code == 200
    assert post(service, prompt=None).json()["error"]["message"] == "prompt: Field required"


def test_open_requests_hear_that_the_service_ends(
    service_with: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """A stream ends with a reason, a whole answer with 503, and one that never came in whole too; nothing is logged."""
    service = service_with()
    address = service.url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(1) as pool, socket.create_connection((address[0], int(address[1]))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        whole = pool.submit(post, service, prompt="x", max_tokens=500)
        while not httpx.get(service.url + "/health").json()["active"]:
            time.sleep(0.01)
        body = {"prompt": "x", "max_tokens": 500, "stream": True}
        with httpx.stream("POST", service.url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            service.server.should_exit = True
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-2] and rest[-1] == "data: [DONE]"
        assert whole.result().status_code == 503
        slow.settimeout(20)
        assert slow.recv(12) == b"HTTP/1.1 503"
    assert "Traceback" not in "".join(capfd.readouterr())


def test_key(service_with: Callable[..., Any]) -> None:
    service = service_with(api_keys=["secret"])
    assert post(service, prompt="x").status_code == 401
    assert httpx.get(service.url + "/metrics").status_code == 401
    assert httpx.get(service.url + "/health").status_code == 200
    assert httpx.get(service.url + "/").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        client_of(service, "secre").completions.create(model="small", prompt="x", max_tokens=2)
    assert client_of(service, "secret").completions.create(model="small", prompt="x", max_tokens=2).choices


def test_full_queue_and_waiting(service_with: Callable[..., Any]) -> None:
    """More than the queue holds is refused at once; who waits longer than allowed is told so; nobody hangs."""
    service = service_with(queue_size=6, queue_seconds=0.3)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: post(service, prompt="x" * 100, max_tokens=250), range(24)))
    found = {status: [one for one in answers if one.status_code == status] for status in (200, 429, 503)}
    assert sum(map(len, found.values())) == 24
    assert found[200] and found[429]
    assert all(one.headers["retry-after"] for one in (*found[429], *found[503]))
    metrics = httpx.get(service.url + "/metrics").text
    assert f"megatron_retro_waiting_seconds_count {len(found[200])}" in metrics
    assert 'megatron_retro_refused_total{reason="queue full"}' in metrics


def test_leaving_clients_free_their_place_and_log_a_line(
    service_with: Callable[..., Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    service = service_with()
    with httpx.stream(
        "POST", service.url + "/v1/completions", json={"prompt": "x", "max_tokens": 500, "stream": True}, timeout=60
    ) as response:
        next(response.iter_lines())
    address = service.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as raw:
        body = json.dumps({"prompt": "x", "max_tokens": 500}).encode()
        raw.sendall(head_of(len(body)) + body)
        time.sleep(0.2)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        health = httpx.get(service.url + "/health").json()
        if health["active"] == health["waiting"] == 0:
            break
        time.sleep(0.05)
    assert health["active"] == health["waiting"] == 0
    assert "megatron_retro_cancelled_total 2" in httpx.get(service.url + "/metrics").text
    written = "\n".join((caplog.text, *capfd.readouterr()))
    assert written.count("a client left") == 2 and "never retrieved" not in written


def test_slow_reader_does_not_hold_up_others(service_with: Callable[..., Any]) -> None:
    service = service_with(send_seconds=1.0)
    address = service.url.removeprefix("http://").split(":")
    slow = socket.create_connection((address[0], int(address[1])))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    body = json.dumps({"prompt": "x" * 60, "max_tokens": 400, "stream": True, "retrieval": True}).encode()
    slow.sendall(head_of(len(body)) + body)
    assert post(service, prompt="quick", max_tokens=5).status_code == 200  # while the slow one is still there
    slow.close()


def test_crowd(service: Any) -> None:
    """Many clients at once, streaming and not, get what a lone client gets."""
    prompts = [f"{number} chunks of tokens" for number in range(12)]
    alone = {
        prompt: post(service, prompt=prompt, max_tokens=30, temperature=0).json()["choices"][0]["text"]
        for prompt in prompts
    }
    client = client_of(service)

    def ask(number: int) -> tuple[str, str]:
        prompt = prompts[number % len(prompts)]
        if number % 2:
            events = client.completions.create(model="small", prompt=prompt, max_tokens=30, temperature=0, stream=True)
            return prompt, "".join(event.choices[0].text for event in events)
        answer = client.completions.create(model="small", prompt=prompt, max_tokens=30, temperature=0)
        return prompt, answer.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    assert all(alone[prompt] == text for prompt, text in answers)


def test_failing_engine_keeps_serving(
    service_with: Callable[..., Any], generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_with()
    once = threading.Event()
    real = type(generator.forward).next_logits

    def faulty(self: Any, *arguments: Any) -> Any:
        if not once.is_set():
            once.set()
            raise RuntimeError("out of luck")
        return real(self, *arguments)

    monkeypatch.setattr(type(generator.forward), "next_logits", faulty)
    assert post(service, prompt="x", max_tokens=3).status_code == 500
    assert httpx.get(service.url + "/health").json()["status"] == "failing"
    assert post(service, prompt="x", max_tokens=3).status_code == 200
