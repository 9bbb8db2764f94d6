"""`POST /v1/embeddings`: vectors of texts, from the embedder that the retrieval index was built with."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from megatron_retro.inference.serving.answering import Service, token_lists
from megatron_retro.inference.serving.engine_thread import RequestRefused
from megatron_retro.inference.serving.fields import StrictModel, Text, TokenList
from megatron_retro.inference.serving.metrics import Metrics

_MAX_TEXTS = 2048
_MAX_TOKENS = 1 << 16
_CHUNKS_AT_ONCE = 32  # answers search with the same embedder, between two of these


class EmbeddingRequest(StrictModel):
    """OpenAI's fields."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=_MAX_TEXTS)]
        | TokenList
        | Annotated[list[TokenList], Field(min_length=1, max_length=_MAX_TEXTS)]
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="taken if it is the embedder's own")
    user: str | None = None


class Embedding(BaseModel):
    """The vector of one text: numbers, or float32 in base64."""

    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str
    index: int


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The vectors in the order of their texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embeddings(application: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add the route. One request is embedded at a time, in a thread."""
    embedding = asyncio.Lock()

    @application.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest) -> Response:
        metrics.count("megatron_retro_requests_total", kind=type(body).__name__)
        service.require_model(body.model)
        async with embedding:
            answer = await asyncio.to_thread(_answer, service, body)
        return JSONResponse(answer.model_dump())


def _answer(service: Service, body: EmbeddingRequest) -> EmbeddingList:
    texts = [_require_known(service, tokens) for tokens in token_lists(body.input, service.generator.tokenizer.encode)]
    count = sum(map(len, texts))
    if count > _MAX_TOKENS:
        raise RequestRefused(f"{count} tokens to embed", 400, f"send at most {_MAX_TOKENS} in one request")
    vectors = _vectors(service, texts)
    if body.dimensions not in (None, vectors.shape[1]):
        raise RequestRefused(
            f"there are no embeddings of {body.dimensions} dimensions here", 400, f"ask for {vectors.shape[1]}, or none"
        )
    return EmbeddingList(
        data=[
            Embedding(embedding=_written(vector, body.encoding_format), index=index)
            for index, vector in enumerate(vectors)
        ],
        model=service.model_name,
        usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count),
    )


def _require_known(service: Service, tokens: Sequence[int]) -> Sequence[int]:
    size = service.generator.tokenizer.vocab_size
    if not tokens:
        raise RequestRefused("a text is empty", 400, "leave it out")
    if max(tokens) >= size:
        raise RequestRefused(f"there is no token {max(tokens)}", 400, f"send 0 to {size - 1}")
    return tokens


def _vectors(service: Service, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """One for each text: that of its chunk, or the mean of them."""
    index = service.generator.index
    if index is None:
        raise RequestRefused("embeddings need the embedder of an index", 400, "start the service with --retro-index")
    length = index.database.chunk_length
    chunks = [text[start : start + length] for text in texts for start in range(0, len(text), length)]
    found = [index.embed(chunks[at : at + _CHUNKS_AT_ONCE]) for at in range(0, len(chunks), _CHUNKS_AT_ONCE)]
    ends = np.cumsum([-(-len(text) // length) for text in texts])[:-1]
    weights = np.array([len(chunk) for chunk in chunks], np.float32)
    parts = zip(np.split(np.concatenate(found), ends), np.split(weights, ends), strict=True)
    return np.stack([_mean(vectors, weight) for vectors, weight in parts])


def _mean(vectors: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean by numbers of tokens, as long as the vectors are on average: of length one where they are."""
    mean: NDArray[np.float32] = vectors[0]
    if len(vectors) > 1:
        mean = np.average(vectors, axis=0, weights=weights)
        length = np.average(np.linalg.norm(vectors, axis=1), weights=weights)
        mean = mean * np.float32(length / max(float(np.linalg.norm(mean)), 1e-12))
    return mean


def _written(vector: NDArray[np.float32], encoding: str) -> list[float] | str:
    if encoding == "float":
        return [float(number) for number in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
