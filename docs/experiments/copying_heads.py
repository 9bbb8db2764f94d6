"""Which heads of a decoder copy: the share of attention that goes to what followed the same token before.

    python docs/experiments/copying_heads.py DECODER

Random tokens stand twice in one sequence; a head that copies (an induction head) looks from a token's second place to
the token behind its first. The names printed are what `--retro-open-heads` takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.assembly.loading import load_model
from megatron_retro.config.model import ModelConfig
from megatron_retro.model.context import rotary_frequencies
from megatron_retro.ops.rotary import apply_rotary, rotary_table
from megatron_retro.runtime.console import say


@torch.no_grad()
def copying_scores(module: Any, model: ModelConfig, length: int, seed: int) -> Tensor:
    """[layers, heads]: mean attention from the second place of a token to what followed its first."""
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size or 1, (1, length), generator=draws).repeat(1, 2)
    projected: list[Tensor] = []
    for layer in module.layers.values():
        layer.attention.query_key_value.register_forward_hook(lambda _, arguments, result: projected.append(result))
    module(tokens)
    frequencies = rotary_frequencies(model)
    assert frequencies is not None
    table = rotary_table(torch.arange(2 * length)[None], frequencies)
    tables = [table if model.rotation(layer) else None for layer in range(1, model.num_layers + 1)]
    return torch.stack([_scores(one, model, each, length) for one, each in zip(projected, tables, strict=True)])


def _scores(projected: Tensor, model: ModelConfig, table: Any, length: int) -> Tensor:
    size, groups = model.head_size(), model.num_key_value_heads()
    shared = model.num_attention_heads // groups
    heads = projected.reshape(1, 2 * length, groups, shared + 2, size)
    query, key = heads[..., :shared, :].flatten(2, 3), heads[..., shared, :]
    if table is not None:
        query, key = (apply_rotary(each, table, interleaved=model.rotary_interleaved) for each in (query, key))
    scores = torch.einsum("snd,tnd->nst", query[0], key[0].repeat_interleave(shared, 1)) / size**0.5
    future = torch.ones(2 * length, 2 * length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights[:, length:-1, 1:length].diagonal(dim1=1, dim2=2).mean(-1)


def main() -> int:
    """Print the heads above the threshold, the best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.25)
    arguments = parser.parse_args()
    loaded = load_model(arguments.decoder, device="cpu", dtype="fp32")
    scores = copying_scores(loaded.module, loaded.settings[ModelConfig], arguments.length, arguments.seed)
    for place in scores.flatten().argsort(descending=True).tolist():
        layer, head = divmod(place, scores.shape[1])
        if scores[layer, head] >= arguments.threshold:
            say(f"{layer + 1}.{head + 1}  {scores[layer, head]:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
