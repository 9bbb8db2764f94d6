"""What the service says a text's neighbours got and are worth is what a lone reading of the text sees."""

from __future__ import annotations

import json
from typing import Any

import httpx
import torch

from megatron_retro.inference.forward import stack_neighbors
from megatron_retro.inference.generation import GenerationRequest
from megatron_retro.model.reading import read_neighbors
from tests.inference.serving.test_service import PROMPT, post


def test_attention_is_what_a_lone_reading_sees(service: Any, generator: Any) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "retrieval": True, "attention": True}
    chunks = post(service, **asked).json()["choices"][0]["retrieval"]
    request = GenerationRequest(generator.tokens_of(PROMPT), 40, source=generator.source("live"))
    (alone,) = generator.engine.generate([request])
    read, shape = alone.tokens[:-1], generator.forward.neighbor_shape
    found = [one.found for one in alone.retrievals]
    neighbors = stack_neighbors([found], shape, torch.device("cpu"))
    expected = read_neighbors(generator.forward.model, torch.tensor(alone.tokens), neighbors)
    assert len(chunks) == len(found) == len(read) // 16
    assert expected.worth_CK.any()
    for chunk, one, weights_KR, worth_K in zip(chunks, found, expected.attention_CKR, expected.worth_CK, strict=True):
        for neighbor, mask, weights, worth in zip(chunk["neighbors"], one.mask_KR, weights_KR, worth_K, strict=True):
            assert abs(neighbor["worth"] - float(worth)) < 1e-3
            pieces, shown = zip(*neighbor["attention"], strict=True)
            assert "".join(pieces) == neighbor["text"]
            assert torch.allclose(torch.tensor(shown), weights[torch.from_numpy(mask)], atol=1e-4)
    body = {**asked, "stream": True}
    with httpx.stream("POST", service.url + "/v1/completions", json=body, timeout=60) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert events[-1]["choices"][0]["retrieval"] == chunks  # all of them once more, with the last event
    assert all(
        not chunk["neighbors"][0]["attention"] for event in events[:-1] for chunk in event["choices"][0]["retrieval"]
    )


def test_neighbors_that_nothing_has_read_got_nothing(generator: Any) -> None:
    """A text may end before the token that would have read the last ones."""
    forward = generator.forward
    (text,) = generator.engine.generate(
        [GenerationRequest(generator.tokens_of(PROMPT), 40, source=generator.source("live"))]
    )
    found = {one.query_stop // forward.chunk_length - 1: one.found for one in text.retrievals}
    last = max(found)
    whole, cut = (forward.reading(text.tokens[:stop], found) for stop in (None, (last + 1) * forward.chunk_length))
    assert len(whole) == len(cut) == len(found)
    assert not cut[-1].attention_KR.any() and not cut[-1].worth_K.any()
    assert whole[-1].attention_KR.any() and whole[-1].worth_K.any() and cut[0].attention_KR.any()
