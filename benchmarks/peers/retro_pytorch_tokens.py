"""retro-pytorch 0.3.9 as a peer: seconds for one more token, which is a forward over everything before it.

It is installed apart (see `peer_packages.py`). Its import of autofaiss, which pins an old numpy and is not used here,
is met by a stand-in.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import torch


def one_token(width: int, layers: int, heads: int, vocabulary: int, context: int) -> Callable[[], object]:
    """A call that computes the token after `context` tokens, with two neighbours of 128 tokens for each chunk."""
    unused = types.ModuleType("autofaiss")
    unused.build_index = None  # type: ignore[attr-defined]
    sys.modules.setdefault("autofaiss", unused)
    from retro_pytorch import RETRO

    torch.manual_seed(0)
    model = RETRO(
        num_tokens=vocabulary,
        max_seq_len=context,
        enc_dim=width,
        enc_depth=2,
        dec_dim=width,
        dec_depth=layers,
        dec_cross_attn_layers=(6,),
        heads=heads,
        dim_head=width // heads,
        chunk_size=64,
    ).eval()
    tokens = torch.randint(1, vocabulary, (1, context))
    retrieved = torch.randint(1, vocabulary, (1, context // 64, 2, 128))

    @torch.inference_mode()
    def call() -> object:
        return model(tokens, retrieved)[:, -1].argmax()

    return call
