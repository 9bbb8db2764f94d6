"""One GPT layer of two other libraries, to be counted beside ours: the same widths, without data, on any device.

Hugging Face's Llama comes with transformers, megatron-core is installed apart (see `peer_packages.py`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerShape:
    """What all candidates share: gated MLP, no biases, rotary positions on all of a head, causal."""

    hidden: int
    heads: int
    ffn: int
    length: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


@contextlib.contextmanager
def hugging_face_layer(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Call]]:
    """Llama's: RMSNorm, attention by `scaled_dot_product_attention`."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(  # type: ignore[call-arg]  # it takes keywords that its base class names
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    with device:
        layer = LlamaDecoderLayer(config, 0).to(dtype)
        positions = tuple(torch.empty(1, shape.length, shape.head_size, dtype=dtype) for _ in range(2))

    def call(hidden_BSH: Tensor) -> Tensor:
        output = layer(hidden_BSH, attention_mask=None, position_embeddings=positions)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    yield layer, call


@contextlib.contextmanager
def megatron_core_layer(
    shape: LayerShape, device: torch.device, dtype: torch.dtype, tensor_ranks: int
) -> Iterator[tuple[nn.Module, Call]]:
    """The local spec, which needs neither Transformer Engine nor Apex: LayerNorm, scores written out.

    A process group is open. Its functions that a compiler fuses run as they are. The local norms refuse sequence
    parallelism.
    """
    with mock.patch.object(torch, "compile", lambda function, **_: function):  # as core decorates with it
        from megatron.core import parallel_state
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        tensor_model_parallel_size=tensor_ranks,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    parallel_state.initialize_model_parallel(tensor_ranks, create_gloo_process_groups=False)
    with mock.patch.object(torch.cuda, "current_device", lambda: device), _without_random_states():
        with device:
            default = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            layer: Any = build_module(get_gpt_layer_local_spec(), config=config, layer_number=1)
            torch.set_default_dtype(default)
            mask = torch.ones(1, 1, shape.length, shape.length, dtype=torch.bool)
            rotary = torch.empty(shape.length, 1, 1, shape.head_size)
        yield layer, lambda hidden_SBH: layer(hidden_SBH, attention_mask=mask, rotary_pos_emb=rotary)[0]
    parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def _without_random_states() -> Iterator[None]:
    """Nothing is dropped, and there is no CUDA generator to fork."""

    class NoTracker:
        def fork(self, *_: Any) -> Any:
            return contextlib.nullcontext()

    name = "get_cuda_rng_tracker"
    with contextlib.ExitStack() as patches:
        for path, module in list(sys.modules.items()):
            if path.startswith("megatron.core") and hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, lambda *_, **__: NoTracker()))
        yield
