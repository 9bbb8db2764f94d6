"""No layer asks its device for a value (a GPU would wait) or mixes devices: on the meta device both are errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_retro.microbatch import Microbatch
from megatron_retro.testing.layouts import LIKE_LLAMA, LIKE_OLMO2, random_batches, tiny_settings
from megatron_retro.testing.single_process import one_process


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LIKE_LLAMA,
        LIKE_OLMO2,
        {"retro_add_retriever": False},
        {"position_embedding_type": "learned_absolute"},
        {"position_embedding_type": "relative"},
        {"position_embedding_type": "none"},
        {"retro_neighbor_positions": "relative"},
        {"retro_neighbor_positions": "none"},
        {"retro_gate_type": "scalar"},
        {"retro_gate_type": "adaptive"},
        {"retro_legacy_checkpoint": True},
        {"retro_core_checkpoint": True, "position_embedding_type": "learned_absolute"},
        {"qk_layernorm": True},
        {"sliding_window": 4},
        {"squared_relu": True},
        {"gelu_tanh": True},
        {"rope_scaling_type": "llama3"},
        {"hidden_dropout": 0.1, "attention_dropout": 0.1, "retro_encoder_hidden_dropout": 0.1},
        {"recompute_granularity": "full"},
        {"freeze_decoder": True},
        {"peft_method": "lora", "lora_dropout": 0.1},
        {"peft_method": "adapter"},
        {"peft_method": "ia3"},
        {"peft_method": "p-tuning"},
    ],
    ids=lambda changes: " ".join(map(str, changes)) or "default",
)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_forward_and_backward(changes: dict[str, Any], kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RETRO_KERNELS", kernels)
    settings, meta = tiny_settings(**changes), torch.device("meta")
    module = one_process(settings, meta).module.train()
    (batch, *_) = random_batches(settings)
    batch = Microbatch.of_arrays({name: tensor.to(meta) for name, tensor in batch.arrays().items()})
    losses_BS = module(
        batch.tokens_BS,
        batch.neighbors,
        labels_BS=batch.labels_BS,
        position_ids_BS=batch.position_ids_BS,
        document_ids_BS=batch.document_ids_BS,
    )
    assert losses_BS.shape == batch.tokens_BS.shape and losses_BS.is_meta
    if "relative" in changes.values():
        return  # torch's own attention with a trained bias has no backward pass on meta
    losses_BS.sum().backward()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.is_meta for parameter in trained)
