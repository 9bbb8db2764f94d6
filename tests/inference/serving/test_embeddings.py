"""Vectors of the index's embedder through OpenAI's client: texts of one chunk, of several, tokens, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest

LONG = "forty bytes are two chunks and a half, so"


def test_openai_client_embeddings(service: Any, generator: Any) -> None:
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
    texts = ["a quick fox", "another text!", LONG]
    answer = client.embeddings.create(model="small", input=texts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
    assert [one.index for one in answer.data] == [0, 1, 2] and answer.model == "small"
    embed = generator.index.embed
    for one, text in zip(answer.data[:2], texts, strict=False):
        assert np.array_equal(np.float32(one.embedding), embed([text.encode()])[0]), "what a live query is embedded as"
    parts = [LONG.encode()[start : start + 16] for start in range(0, len(LONG), 16)]
    mean = np.average(embed(parts), axis=0, weights=[len(part) for part in parts])
    np.testing.assert_allclose(answer.data[2].embedding, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-7)
    floats = client.embeddings.create(model="small", input=list(LONG.encode()), encoding_format="float", dimensions=257)
    assert floats.data[0].embedding == pytest.approx(answer.data[2].embedding)
    tokens = client.embeddings.create(model="small", input=[list(text.encode()) for text in texts])
    assert tokens.data == answer.data


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": ""}, 400, "a text is empty"),
        ({"input": []}, 400, "input"),
        ({"input": [257]}, 400, "no token 257"),
        ({"input": "x", "dimensions": 256}, 400, "ask for 257"),
        ({"input": "x", "model": "other"}, 404, "no model 'other'"),
        ({"input": "x" * 65_537}, 400, "65537 tokens"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"input": "x", "encoding_format": "int8"}, 400, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_said(service: Any, body: dict[str, Any], status: int, words: str) -> None:
    answer = httpx.post(service.url + "/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_without_an_index_there_are_none(
    service_with: Callable[..., Any], generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "index", None)
    answer = httpx.post(service_with().url + "/v1/embeddings", json={"input": "x"}, timeout=60)
    assert answer.status_code == 400 and "--retro-index" in answer.json()["error"]["message"]
