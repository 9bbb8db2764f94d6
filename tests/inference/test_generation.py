"""Cached generation in a changing batch equals teacher forcing that is fed the same neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.inference import large_pages
from megatron_retro.inference.engine import Engine, EngineLimits
from megatron_retro.inference.forward import LocalForward, stack_neighbors
from megatron_retro.inference.generation import Generation, GenerationRequest
from megatron_retro.inference.large_pages import store_for_decoding
from megatron_retro.inference.neighbor_sources import GivenPassages
from megatron_retro.inference.sampling import Sampling
from megatron_retro.model.retro import Retro
from megatron_retro.ops.backends import NATIVE, VARIABLE, choice

CHUNK = 8


class NeverEnds(ByteTokenizer):
    """No end of document, so that lengths are what was asked for."""

    vocab_size = 256


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    draws = np.random.default_rng(seed)
    lengths = [1, 2, 7, 8, 9, 16, 23, 40, *draws.integers(1, 50, max(0, count - 8))]
    return [tuple(draws.integers(0, 256, length).tolist()) for length in lengths[:count]]


def teacher_forced(model: Retro, tokens: Sequence[int], source: Any) -> Tensor:
    """[S, V] of one forward over the whole text."""
    whole = len(tokens) // CHUNK
    chunks = [tokens[number * CHUNK : (number + 1) * CHUNK] for number in range(whole)]
    shape = LocalForward(model).neighbor_shape
    neighbors = None if source is None else stack_neighbors([source.find(chunks)], shape, torch.device("cpu"))
    with torch.inference_mode():
        return model(torch.tensor([tokens]), neighbors)[0, :, :256]


def compare(generation: Generation, logits_SV: Tensor, tolerance: float = 2e-4) -> None:
    """Every chosen token is the most likely one, with the probability that teacher forcing gives it."""
    start = len(generation.request.prompt) - 1
    expected = logits_SV[start:].log_softmax(-1)
    chosen = torch.tensor(generation.new_tokens)
    assert len(chosen) == generation.request.max_new_tokens
    best = expected.max(-1).values
    picked = expected.gather(1, chosen[:, None])[:, 0]
    torch.testing.assert_close(picked, best, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group_query_attention": True, "num_query_groups": 2, "sliding_window": 11},
        {"retro_gate_type": "adaptive", "position_embedding_type": "learned_absolute"},
        {"retro_neighbor_positions": "relative", "normalization": "RMSNorm"},
        {"retro_neighbor_positions": "none", "retro_encoder_hidden_size": 16, "retro_encoder_own_embedding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefill_tokens", [5, 512])
def test_equals_teacher_forcing(
    small_model: Callable[..., Retro], hashed: Any, changes: dict[str, Any], prefill_tokens: int
) -> None:
    model = small_model(**changes)
    engine = Engine(LocalForward(model), NeverEnds(), EngineLimits(3, 128, prefill_tokens))
    requests = [GenerationRequest(prompt, 10 + 3 * number, source=hashed) for number, prompt in enumerate(prompts(8))]
    requests[4] = GenerationRequest(requests[4].prompt, 20, source=None)
    for generation in engine.generate(requests):
        source = generation.request.source
        compare(generation, teacher_forced(model, generation.tokens[:-1], source))
        stops = [reading.query_stop for reading in generation.retrievals]
        assert stops == ([] if source is None else list(range(CHUNK, len(generation.tokens), CHUNK)))


def test_neighbors_matter(small_model: Callable[..., Retro], hashed: Any) -> None:
    """The comparison above would notice neighbours that are not read."""
    model = small_model()
    tokens = prompts(8)[7]
    real, none = teacher_forced(model, tokens, hashed), teacher_forced(model, tokens, None)
    assert torch.equal(real[: CHUNK - 1], none[: CHUNK - 1])
    assert (real[CHUNK - 1 :] - none[CHUNK - 1 :]).abs().max() > 0.1


def stepwise_reference(model: Retro, generation: Generation) -> Tensor:
    """[S, V] with each position reading what it read while it was generated: no cache, no moved grid.

    For a query window that ends at position e, the positions e, e+1, ... see its neighbours as the last token of a
    chunk and its successors do.
    """
    tokens_BS = torch.tensor([generation.tokens[:-1]])
    length = tokens_BS.shape[1]
    context = model.prepare(1, length, tokens_BS.device)
    hidden = model.embed(tokens_BS, context)
    windows: list[tuple[int, Any, Tensor | None]] = []
    for name, layer in model.layers.items():
        pattern, rotary = context.patterns[layer.window], context.rotary[layer.rotation]
        hidden = hidden + layer.attention(layer.input_norm(hidden), pattern, rotary)
        if layer.cross_attention is not None:
            normed = layer.cross_norm(hidden)
            if int(name) == model.first_retrieval_layer:
                windows = [encoded_window(model, reading, normed) for reading in generation.retrievals]
            found = torch.zeros_like(hidden)
            for number, (end, neighbors, encoded) in enumerate(windows):
                stop = min(windows[number + 1][0] if number + 1 < len(windows) else end + CHUNK, end + CHUNK, length)
                lead = normed.new_zeros(1, CHUNK - 1, normed.shape[2])
                queries = torch.cat((lead, normed[:, end:stop]), 1)
                context_of_window = model.prepare(1, queries.shape[1], queries.device, neighbors=neighbors)
                read = layer.cross_attention(queries, encoded, context_of_window.retrieval)
                found[:, end:stop] = read[:, CHUNK - 1 :]
            hidden = hidden + found
        hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
    return model.head(hidden)[0, :, :256]


def encoded_window(model: Retro, reading: Any, normed_BSH: Tensor) -> tuple[int, Any, Tensor]:
    neighbors = stack_neighbors([[reading.found]], LocalForward(model).neighbor_shape, torch.device("cpu"))
    assert neighbors is not None
    state = normed_BSH[:, reading.query_start : reading.query_stop][:, None]
    return reading.query_stop - 1, neighbors, model.encode(neighbors, state, None)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_retrieval_step(small_model: Callable[..., Retro], hashed: Any, step: int) -> None:
    """Neighbours of the last m tokens every few tokens: later positions read them, cached states stay."""
    model = small_model()
    engine = Engine(LocalForward(model), NeverEnds(), EngineLimits(4, 128))
    requests = [GenerationRequest(prompt, 30, source=hashed, retrieval_step=step) for prompt in prompts(8)]
    for generation in engine.generate(requests):
        with torch.inference_mode():
            compare(generation, stepwise_reference(model, generation))
        prompt_length = len(generation.request.prompt)
        refreshed = [one.query_stop for one in generation.retrievals if one.query_stop >= prompt_length]
        late = [stop for stop in refreshed if stop >= prompt_length + CHUNK]
        assert all((stop - prompt_length) % step == 0 for stop in late)
        assert len(late) >= (len(generation.tokens) - 1 - prompt_length - CHUNK) // step
        assert all(one.query_stop - one.query_start == CHUNK for one in generation.retrievals)


def test_company_changes_nothing(small_model: Callable[..., Retro], hashed: Any) -> None:
    """A sampled text is the same alone and in any batch."""
    model = small_model()
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)
    requests = [GenerationRequest(prompt, 24, sampling, source=hashed) for prompt in prompts(6)]
    alone = [Engine(LocalForward(model), NeverEnds()).generate([request])[0].tokens for request in requests]
    together = Engine(LocalForward(model), NeverEnds(), EngineLimits(4, 128, 7)).generate(requests)
    assert [one.tokens for one in together] == alone


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kernels", "large_page"), [("reference", 2 << 20), ("auto", 2 << 20), ("auto", 4096)])
def test_the_layout_for_decoding(
    small_model: Callable[..., Retro],
    hashed: Any,
    monkeypatch: pytest.MonkeyPatch,
    kernels: str,
    large_page: int,
    tied: bool,
) -> None:
    """It changes no name, no shape and no result beyond rounding, and PyTorch's product gets matrices by inputs."""
    monkeypatch.setenv(VARIABLE, f"small_batch_gemv={kernels}")
    monkeypatch.setattr(large_pages, "LARGE_PAGE", large_page)
    by_outputs = choice("small_batch_gemv", "cpu").backend == NATIVE
    model = small_model(untie_embeddings_and_output_weights=not tied)
    tokens, table = prompts(8)[7], model.embedding.word.weight
    place = table.data_ptr()
    before, shapes = teacher_forced(model, tokens, hashed), {name: one.shape for name, one in model.named_parameters()}
    stored = store_for_decoding(model)
    assert {name: one.shape for name, one in stored.named_parameters()} == shapes
    assert stored.layers["0"].mlp.down.weight.is_contiguous() == by_outputs
    assert (table.data_ptr() != place) == (tied and by_outputs), "a table that is read whole for every token"
    torch.testing.assert_close(teacher_forced(stored, tokens, hashed), before, atol=1e-4, rtol=1e-4)


def test_given_passages_and_stop(small_model: Callable[..., Retro]) -> None:
    model = small_model()
    forward = LocalForward(model)
    source = GivenPassages([b"a passage that is too long for its place", b"short"], *forward.neighbor_shape)
    assert source.found.token_lists()[1] == list(b"short")
    assert len(source.found.token_lists()[0]) == forward.neighbor_shape[1]
    request = GenerationRequest(prompts(8)[6], 40, source=source)
    (whole,) = Engine(forward, NeverEnds()).generate([request])
    compare(whole, teacher_forced(model, whole.tokens[:-1], source))
    stop = whole.text[10:12]
    stopped_request = GenerationRequest(request.prompt, 40, stop_strings=(stop,), source=source)
    (stopped,) = Engine(forward, NeverEnds()).generate([stopped_request])
    assert stopped.finish_reason == "stop" and stopped.text == whole.text[: whole.text.index(stop)]


def test_cancelling_frees_the_place(small_model: Callable[..., Retro]) -> None:
    engine = Engine(LocalForward(small_model()), NeverEnds(), EngineLimits(2, 64))
    heard: list[str] = []
    first = engine.submit(GenerationRequest(prompts(1)[0], 50), heard.append)
    others = [engine.submit(GenerationRequest(prompt, 5)) for prompt in prompts(4)]
    for _ in range(4):
        engine.step()
    engine.cancel(first)
    while engine.step():
        pass
    assert first.finish_reason == "cancelled" and heard[-1] == "" and len(first.new_tokens) < 50
    assert all(other.finish_reason == "length" for other in others)
    assert engine.num_active == engine.num_waiting == 0


def test_short_prompts_are_read_together(small_model: Callable[..., Retro], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within `prefill_tokens`, and as each one's end comes; one that is cancelled meanwhile holds up nobody."""
    model, widths = small_model(), list[tuple[int, int]]()
    forward = LocalForward(model)
    prefill = forward.prefill
    monkeypatch.setattr(
        forward, "prefill", lambda given, *rest: (widths.append((len(given), len(given[0]))), prefill(given, *rest))
    )
    engine = Engine(forward, NeverEnds(), EngineLimits(4, 128, 40))
    requests = [GenerationRequest(tuple(range(1, 1 + length)), 3) for length in (9, 6, 9, 13, 30)]
    scored = GenerationRequest(tuple(range(40)), 3, score_prompt=True)
    begun = [engine.submit(request) for request in requests]
    engine.step()
    begun[2].finish("cancelled")
    generations = engine.generate([scored])
    assert widths == [(4, 5), (2, 3), (1, 4), (1, 29)]
    for generation in (*begun[:2], *begun[3:], *generations):
        compare(generation, teacher_forced(model, generation.tokens[:-1], None))
    assert len(generations[0].token_logprobs) == len(scored.prompt) - 1


def test_refused_requests(small_model: Callable[..., Retro]) -> None:
    engine = Engine(LocalForward(small_model()), NeverEnds(), EngineLimits(2, 32))
    with pytest.raises(DataError, match="too long"):
        engine.submit(GenerationRequest((1,) * 20, 13))
    with pytest.raises(DataError, match="empty"):
        engine.submit(GenerationRequest((), 3))
    with pytest.raises(DataError, match="does not know"):
        engine.submit(GenerationRequest((300,), 3))
    with pytest.raises(ConfigError, match="retrieval step"):
        engine.submit(GenerationRequest((3,), 3, retrieval_step=9))
    with pytest.raises(ConfigError, match="no token"):
        engine.submit(GenerationRequest((3,), 0))
    learned = small_model(position_embedding_type="learned_absolute", max_position_embeddings=24)
    engine = Engine(LocalForward(learned), NeverEnds(), EngineLimits(2, 32))
    with pytest.raises(DataError, match="model's positions"):
        engine.submit(GenerationRequest((1,) * 20, 5))
    engine.submit(GenerationRequest((1,) * 20, 4))
    while engine.step():
        pass


def test_end_of_document_ends(small_model: Callable[..., Retro], tmp_path: Path) -> None:
    class Eager(ByteTokenizer):
        eod = 0

    model = small_model()
    (free,) = Engine(LocalForward(model), NeverEnds()).generate([GenerationRequest((5, 6), 30)])
    Eager.eod = free.new_tokens[7]
    (ended,) = Engine(LocalForward(model), Eager()).generate([GenerationRequest((5, 6), 30)])
    assert ended.finish_reason == "stop"
    assert ended.new_tokens == free.new_tokens[: free.new_tokens.index(Eager.eod)]
