"""A Retro as transformers loads it (`trust_remote_code=True`): our model from `megatron_retro`, under their interface.

This file is copied beside exported weights. Neighbours are given to `forward`; `generate` works without them, and with
them as long as they cover the chunks of what is fed. Rows may be padded on the left where no neighbours are read. It
keeps no cache: `megatron-retro generate` is the fast way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.layers import DecoderLayer
from megatron_retro.model.retro import Retro


class MegatronRetroConfig(PretrainedConfig):
    """`retro_model` and `retro_retrieval` are the sections of a checkpoint of ours."""

    model_type = "megatron_retro"

    def __init__(
        self, retro_model: dict[str, Any] | None = None, retro_retrieval: dict[str, Any] | None = None, **others: Any
    ) -> None:
        self.retro_model, self.retro_retrieval = retro_model or {}, retro_retrieval or {}
        self.vocab_size = self.retro_model.get("vocab_size")
        self.hidden_size = self.retro_model.get("hidden_size")
        self.num_hidden_layers = self.retro_model.get("num_layers")
        self.num_attention_heads = self.retro_model.get("num_attention_heads")
        super().__init__(**others)


class RecomputedLayer(GradientCheckpointingLayer, DecoderLayer):
    """A layer whose inside transformers may compute again in the backward pass."""


class MegatronRetroForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token, with or without neighbours."""

    config_class = MegatronRetroConfig
    base_model_prefix = "retro"
    supports_gradient_checkpointing = True

    def __init__(self, config: MegatronRetroConfig) -> None:
        super().__init__(config)
        self.retro = Retro(_section(ModelConfig, config.retro_model), _section(RetroConfig, config.retro_retrieval))
        for layer in self.retro.layers.values():
            layer.__class__ = RecomputedLayer
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The module whose `weight` is the table."""
        assert self.retro.embedding is not None
        return self.retro.embedding.word

    def get_output_embeddings(self) -> Any:
        """The same of the output; None where it is the embedding's table."""
        output = self.retro.output
        return output if getattr(output, "weight", None) is not None else None

    def set_input_embeddings(self, value: Any) -> None:
        """Take the table of a module, of as many rows as there are tokens; words are still scaled as they were."""
        _take_table(self.get_input_embeddings(), value)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """The same of the output, where it has a table of its own."""
        output = self.get_output_embeddings()
        if output is None or getattr(new_embeddings, "bias", None) is not None:
            raise ValueError("the output is the embedding's table, or has no bias: it cannot be set to this module")
        _take_table(output, new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Cut or lengthen every table of tokens: new rows are the mean of the old, or drawn as a new model's."""
        num_rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        num_rows += -num_rows % (pad_to_multiple_of or 1)
        own = None if self.retro.encoder is None else self.retro.encoder.embedding
        tables = [self.get_input_embeddings(), self.get_output_embeddings(), None if own is None else own.word]
        for table in tables:
            if table is not None:
                spread = None if mean_resizing else self.retro.model.init_method_std
                table.weight = nn.Parameter(
                    _resized(table.weight.detach(), num_rows, spread), table.weight.requires_grad
                )
        self.config.vocab_size = num_rows
        self.config.retro_model = {**self.config.retro_model, "vocab_size": num_rows}
        self.retro.model = replace(self.retro.model, vocab_size=num_rows)
        assert self.retro.output is not None
        self.retro.output.vocab_size = num_rows
        return self.get_input_embeddings()

    def _init_weights(self, module: Any) -> None:
        """Every value comes from the file."""

    def forward(
        self,
        input_ids: Tensor,
        neighbor_tokens: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """`neighbor_tokens` and `neighbor_mask` are [B, chunks, K, R]; with them, rows are padded at the end alone.

        The loss is the mean over labels, or their sum over `num_items_in_batch`: Trainer's count for a whole step.
        """
        leads = attention_mask is not None and not bool(attention_mask[:, 0].all())
        if leads and neighbor_tokens is not None:
            raise ValueError(
                "rows are padded on the left: their chunks would begin elsewhere than those that neighbours are for; "
                "pad on the right (padding_side='right'), or give texts of one length"
            )
        neighbors = None
        if neighbor_tokens is not None:
            present = neighbor_tokens >= 0 if neighbor_mask is None else neighbor_mask
            neighbors = Neighbors(neighbor_tokens.clamp(min=0), present)
        real = attention_mask.bool() if leads and attention_mask is not None else None  # causal: what ends is unseen
        logits = self.retro(input_ids, neighbors, position_ids_BS=position_ids, padding_mask_BS=real)
        loss = None
        if labels is not None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        neighbor_tokens: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The whole text at each step."""
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "neighbor_tokens": neighbor_tokens,
            "neighbor_mask": neighbor_mask,
        }


def _take_table(ours: Any, theirs: Any) -> None:
    if theirs.weight.shape != ours.weight.shape:
        raise ValueError(
            f"a table of {tuple(theirs.weight.shape)} in place of {tuple(ours.weight.shape)}: "
            "resize_token_embeddings changes the number of tokens"
        )
    ours.weight = theirs.weight


def _resized(table: Tensor, num_rows: int, spread: float | None) -> Tensor:
    mean = table.mean(0, keepdim=True).expand(max(num_rows - len(table), 0), -1)
    added = mean if spread is None else torch.randn_like(mean) * spread
    return torch.cat((table[:num_rows], added))


def _section(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
