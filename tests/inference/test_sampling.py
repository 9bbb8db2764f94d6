"""Choices of tokens agree with transformers' processors; streamed text agrees with decoding all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import DataError
from megatron_retro.inference.generation import TextStream
from megatron_retro.inference.sampling import (
    SampledToken,
    Sampler,
    Sampling,
    fetch_samples,
    keep_top_k,
    keep_top_p,
    penalize,
)
from megatron_retro.runtime.seeds import generator


def choose(sampler: Sampler, logits: torch.Tensor, seen: Sequence[int] = ()) -> SampledToken:
    return fetch_samples([sampler.draw(logits, seen)])[0]


def test_cuts_are_those_of_transformers() -> None:
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = torch.randn(50, generator=generator) * 3
        seen = torch.randint(0, 50, (12,), generator=generator)
        whole = logits[None]
        expected = RepetitionPenaltyLogitsProcessor(1.7)(seen[None], whole.clone())[0]
        torch.testing.assert_close(penalize(logits, seen.tolist(), 1.7), expected)
        torch.testing.assert_close(keep_top_k(logits, 7), TopKLogitsWarper(7)(seen[None], whole)[0])
        torch.testing.assert_close(keep_top_p(logits, 0.6), TopPLogitsWarper(0.6)(seen[None], whole)[0])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=0.7, top_k=3, seed=5))
    draws = np.bincount([choose(sampler, logits).token for _ in range(6000)], minlength=4) / 6000
    expected = [*torch.softmax(logits[:3] / 0.7, 0).tolist(), 0.0]
    np.testing.assert_allclose(draws, expected, atol=0.03)
    again = [choose(Sampler(Sampling(temperature=0.7, seed=5)), logits).token for _ in range(3)]
    assert len(set(again)) == 1


def test_greedy_and_extremes() -> None:
    logits = torch.tensor([0.5, 3.0, -2.0])
    token, logprob, highest = choose(Sampler(Sampling()), logits)
    assert highest == 3.0
    assert token == 1 and logprob == pytest.approx(logits.log_softmax(0)[1].item())
    assert choose(Sampler(Sampling(repetition_penalty=10.0)), logits, [1]).token == 0
    for temperature in (1e-300, 1e-30, 1e30):
        assert choose(Sampler(Sampling(temperature=temperature, seed=1)), logits).token in range(3)
    assert choose(Sampler(Sampling(temperature=1e-300)), logits).token == 1
    for way in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(DataError, match="not finite"):
            choose(Sampler(way), torch.tensor([float("nan"), 1.0])).require_finite()


def test_a_batch_draws_what_torch_draws_one_by_one() -> None:
    """Every text's tokens are those of `torch.multinomial` with its own generator, whatever stands beside it."""
    samplers = [Sampler(Sampling(temperature=0.8, top_p=0.9, seed=seed)) for seed in range(4)]
    generators = [generator(seed, "sampling") for seed in range(4)]
    for step in range(50):
        logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(step)) * 2
        choices = fetch_samples([sampler.draw(row, ()) for sampler, row in zip(samplers, logits, strict=True)])
        for row, choice, source in zip(logits.double(), choices, generators, strict=True):
            chances = keep_top_p((row - row.max()) / 0.8, 0.9).softmax(-1)
            assert choice.token == int(torch.multinomial(chances, 1, generator=source))
            assert choice.logprob == pytest.approx(float(row.log_softmax(-1)[choice.token]), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=10), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_streamed_text_is_the_whole_text(text: str, prompt: str, stops: list[str]) -> None:
    tokenizer = ByteTokenizer()
    try:
        tokens, before = tokenizer.encode(text), tokenizer.encode(prompt)
    except DataError:
        return  # half a surrogate pair
    stream = TextStream(tokenizer.decode, before, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.feed(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) == stream.text == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)


def test_spaces_and_characters_of_a_sentencepiece_model(tmp_path: object) -> None:
    """Pieces that start words, and characters made of several byte pieces, come out as in one go."""
    import io

    import sentencepiece

    from megatron_retro.data.tokenizers import SentencePieceTokenizer

    model = io.BytesIO()
    lines = ["the quick brown fox jumps over the lazy dog", "a quick fox and a lazy dog over there"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, byte_fallback=True, model_type="bpe",
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    from pathlib import Path

    path = Path(str(tmp_path)) / "t.model"
    path.write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(path)
    for text in ("over the fox", " lazy é ☃ dog", "日本 quick", "🦊🦊 fox"):
        tokens = tokenizer.encode("the dog" + text)
        prompt = tokenizer.encode("the dog")
        if tokens[: len(prompt)] != prompt:
            prompt = tokens[:2]
        stream = TextStream(tokenizer.decode, prompt)
        pieces = [stream.feed(token) for token in tokens[len(prompt) :]] + [stream.finish()]
        assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(tokens)
        assert all("�" not in piece for piece in pieces)


def test_biases_and_penalties_are_openais() -> None:
    """logit - count * frequency - (count > 0) * presence + bias, of what was written alone."""
    logits, written = torch.randn(50, generator=torch.Generator().manual_seed(1)).double(), [3, 3, 7, 9, 3]
    biases = {7: 4.5, 11: -100.0}
    expected = logits.clone()
    for token in range(50):
        count = written.count(token)
        expected[token] += biases.get(token, 0.0) - 0.7 * count - (1.3 if count else 0.0)
    sampler = Sampler(Sampling(frequency_penalty=0.7, presence_penalty=1.3, logit_bias=(*biases.items(), (99, 5.0))))
    torch.testing.assert_close(sampler._biased(logits, written), expected)
    token, logprob, _ = fetch_samples([sampler.draw(logits, [1, 2], written)])[0]
    assert token == int(expected.argmax())
    assert logprob == pytest.approx(float(logits.log_softmax(0)[token]))
