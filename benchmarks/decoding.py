"""Decoding a model of many small layers beside transformers: SmolLM2-135M's shape, some texts at once, one thread.

A token's time is the difference between long and short answers. Before anything is timed, the greedy answers of both
must be the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation import EndlessBytes, per_token, write_model

from megatron_retro.assembly.loading import load_model
from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.hugging_face import export_hugging_face
from megatron_retro.inference.generation import GenerationRequest
from megatron_retro.inference.text_generator import TextGenerator, build_text_generator
from megatron_retro.testing.benchmarking import Figure, benchmark_main, interleave, median_ratio

VOCABULARY = 49_152
SMOLLM2 = ModelConfig(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    group_query_attention=True,
    num_query_groups=3,
    vocab_size=VOCABULARY,
    make_vocab_size_divisible_by=1,
    swiglu=True,
    normalization="RMSNorm",
    disable_bias_linear=True,
)


class Numbers(EndlessBytes):
    """Tokens without text."""

    vocab_size = VOCABULARY

    def decode(self, ids: Sequence[int]) -> str:
        return ""


Answers = Callable[[int, int], "list[list[int]]"]


def against_transformers(run: Path, batches: Sequence[int], rounds: int) -> Iterator[Figure]:
    """A token of some texts, and their prompts with the first token."""
    mine, theirs = small_layers_answers(run, max(batches))
    for batch in batches:
        if mine(batch, 8) != theirs(batch, 8):
            raise SystemExit(f"the answers of {batch} texts differ")
        candidates: dict[str, Callable[[], object]] = {}
        for length, word in ((1, "short"), (13, "long")):
            candidates[f"ours {word}"] = partial(mine, batch, length)
            candidates[f"theirs {word}"] = partial(theirs, batch, length)
        times = interleave(candidates, rounds, warm_up=1)
        tokens = median_ratio(per_token(times, "theirs"), per_token(times, "ours"))
        prompts = median_ratio(times["theirs short"].cpu, times["ours short"].cpu)
        yield Figure(f"speed over transformers: a token of {batch} texts", tokens, "x", 1.5)
        yield Figure(f"speed over transformers: {batch} prompts of 64 tokens", prompts, "x", 1.5)


def small_layers_answers(run: Path, most: int) -> tuple[Answers, Answers]:
    """New tokens of some texts, by ours and by transformers."""
    from transformers import AutoModelForCausalLM

    checkpoint = write_model(run / "small_layers", SMOLLM2, RetroConfig())
    peer: Any = AutoModelForCausalLM.from_pretrained(
        export_hugging_face(checkpoint, run / "small_layers_hf"), local_files_only=True
    )
    loaded = load_model(checkpoint, device="cpu")
    built = build_text_generator(loaded, EngineConfig(max_batch_size=most), LiveRetrievalConfig())
    engine = TextGenerator(built.forward, Numbers(), built.limits).engine
    texts = torch.randint(VOCABULARY, (most, 64), generator=torch.Generator().manual_seed(0))

    def mine(batch: int, length: int) -> list[list[int]]:
        requests = [GenerationRequest(tuple(text), length) for text in texts[:batch].tolist()]
        return [one.new_tokens for one in engine.generate(requests)]

    def theirs(batch: int, length: int) -> list[list[int]]:
        with torch.inference_mode():
            found = peer.generate(
                texts[:batch],
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        answers: list[list[int]] = found[:, texts.shape[1] :].tolist()
        return answers

    return mine, theirs


def run(quick: bool) -> Iterator[Figure]:
    """Batches of several sizes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        yield from against_transformers(Path(name), (1, 2) if quick else (1, 8, 32), 1 if quick else 3)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
