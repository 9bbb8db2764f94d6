"""First values of what retro-fitting adds, taken from the decoder (`--retro-init decoder`).

A pretrained decoder can copy from its context already. A retrieval layer's cross-attention starts as the layer's own
self-attention, and the encoder's layers as the decoder's first ones. Self-attention projects a normed input, so the
norm's weight goes into the keys' and values' projection (`--retro-encoder-final-norm` gives it what is normed but for
that weight). A head that copies finds what it looks for in states as deep as its own layer alone
(`--retro-encoder-reads same-depth`); there its gate can start open (`--retro-open-heads`). The encoder's own
cross-attention, which a decoder has no like of, starts as with noise, and closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_retro.checkpoint.live_state import MODEL
from megatron_retro.checkpoint.loading import Checkpoint, load_tensors
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.optim.groups import part_of

Read = Callable[[str], Tensor]
_GATES = "cross_attention.gate.heads"
OPEN = 0.9  # what a gate that starts open lets through
_CLOSED = "encoder.layers.0.cross_attention.output.weight"


@torch.no_grad()
def start_from_decoder(module: nn.Module, checkpoint: Checkpoint, model: ModelConfig, retro: RetroConfig) -> None:
    """Fill this rank's part of everything that retro-fitting adds and the decoder has values for."""
    for name, parameter in module.named_parameters():
        if part_of(name) == "decoder":
            continue
        whole = value_from_decoder(name, partial(_read_whole, checkpoint), model, retro)
        if whole is not None:
            _copy_part(parameter, whole)


def starts_from_decoder(name: str) -> bool:
    """Whether an added parameter's first value follows from the decoder's weights."""
    return source_in_decoder(name) is not None or name == _CLOSED or name.endswith(_GATES)


def source_in_decoder(name: str) -> str | None:
    """The decoder's parameter that an added one starts from; None where there is none."""
    if name.startswith("encoder."):
        same = name.removeprefix("encoder.")
        if name.startswith("encoder.layers.0.cross_norm."):
            return same.replace("cross_norm", "input_norm")
        return same if same.startswith(("layers.", "embedding.")) and ".cross_attention." not in same else None
    layer, _, leaf = name.partition(".cross_")
    if leaf.startswith("norm."):
        return f"{layer}.input_{leaf}"
    if leaf in ("attention.query.weight", "attention.key_value.weight"):
        return f"{layer}.attention.query_key_value.weight"
    return f"{layer}.attention.output.weight" if leaf == "attention.output.weight" else None


def value_from_decoder(name: str, read: Read, model: ModelConfig, retro: RetroConfig) -> Tensor | None:
    """The whole first value of an added parameter; None where it starts as with noise."""
    if name == _CLOSED:
        return torch.zeros(model.hidden_size, model.num_attention_heads * model.head_size())
    if name.endswith(_GATES):
        gates = torch.zeros(model.num_attention_heads)
        gates[retro.open_gates().get(int(name.split(".")[1]) + 1, [])] = math.atanh(OPEN)
        return gates
    source = source_in_decoder(name)
    if source is None:
        return None
    value = read(source)
    if name.endswith("cross_attention.output.weight"):
        return value * (0.0 if retro.retro_zero_init_output else retro.retro_init_output_scale)
    if not name.endswith(("cross_attention.query.weight", "cross_attention.key_value.weight")):
        return value
    size = model.head_size()
    query, key_value = torch.split(value, [value.shape[1] - 2 * size, 2 * size], 1)
    if name.endswith("query.weight"):
        return query.reshape(model.num_attention_heads, size, model.hidden_size)
    if not retro.retro_encoder_final_norm:
        return key_value
    weight = read(source.replace("attention.query_key_value", "input_norm"))
    return key_value * (weight + 1.0 if model.apply_layernorm_1p else weight)


def _read_whole(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = torch.empty(tuple(checkpoint.index.sizes[MODEL + name]))
    load_tensors(checkpoint, {MODEL + name: tensor})
    return tensor


def _copy_part(parameter: Tensor, whole: Tensor) -> None:
    """Every rank copies what it holds; rows of padding (an embedding's) stay zero."""
    if whole.shape != parameter.shape:
        padded = whole.new_zeros(parameter.shape)
        padded[: len(whole)] = whole
        whole = padded
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    for chunk in parameter.__create_chunk_list__():  # type: ignore[no-untyped-call]
        part = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        parameter.to_local().copy_(whole[part])
