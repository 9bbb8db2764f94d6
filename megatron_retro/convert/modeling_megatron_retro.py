"""A Retro as transformers loads it (`trust_remote_code=True`): our model from `megatron_retro`, under their interface.

This file is copied beside exported weights. Neighbours are given to `forward`; `generate` works without them, and with
them as long as they cover the chunks of what is fed. It keeps no cache: `megatron-retro generate` is the fast way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro


class MegatronRetroConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
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


class MegatronRetroForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Logits of the next token, with or without neighbours."""

    config_class = MegatronRetroConfig
    base_model_prefix = "retro"

    def __init__(self, config: MegatronRetroConfig) -> None:
        super().__init__(config)
        self.retro = Retro(_section(ModelConfig, config.retro_model), _section(RetroConfig, config.retro_retrieval))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> Any:
        """The module whose `weight` is the table."""
        assert self.retro.embedding is not None
        return self.retro.embedding.word

    def get_output_embeddings(self) -> Any:
        """The same of the output; None where it is the embedding's table."""
        output = self.retro.output
        return output if getattr(output, "weight", None) is not None else None

    def _init_weights(self, module: Any) -> None:
        """Every value comes from the file."""

    def forward(
        self,
        input_ids: Tensor,
        neighbor_tokens: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """`neighbor_tokens` and `neighbor_mask` are [B, chunks, K, R]; rows may be padded on the right alone."""
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("rows are padded on the left: chunks would begin elsewhere; give texts of one length")
        neighbors = None
        if neighbor_tokens is not None:
            present = neighbor_tokens >= 0 if neighbor_mask is None else neighbor_mask
            neighbors = Neighbors(neighbor_tokens.clamp(min=0), present)
        logits = self.retro(input_ids, neighbors)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
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


def _section(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
