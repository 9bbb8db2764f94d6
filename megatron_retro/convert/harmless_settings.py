"""Which settings of a Hugging Face `config.json` leave the decoder's function alone, whatever family it names.

Published files carry names, metadata, leftovers of training and of generation, and switches of what other models have.
They never stop an import. Where a setting could change the function, its neutral value is neutral.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

# names, seeds, caches, times, tokens; how a model was trained, is split over devices, or draws its tokens
_HARMLESS_NAMES = """
    architectures model_type dtype torch_dtype name_or_path auto_map custom_pipelines tokenizer_class model_name
    transformers.js_config id2label label2id num_labels problem_type finetuning_task task_specific_params
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id prefix suppress_tokens begin_suppress_tokens
    initializer_range init_std initializer_factor embedding_initializer_range use_cache max_sequence_length seq_length
    max_seq_len max_seq_length model_max_length original_max_position_embeddings n_ctx n_inner_ctx
    attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop embedding_dropout residual_dropout
    attention_probs_dropout_prob hidden_dropout_prob attn_dropout resid_dropout dropout
    cache_implementation gradient_checkpointing use_reentrant use_bfloat16 bf16 fp16 fp32 torchscript tf_legacy_loss
    attn_implementation use_flash_attn use_flash_attention use_flash_attention_2 flash_attention
    chunk_size_feed_forward output_attentions output_hidden_states output_past output_scores return_dict
    return_dict_in_generate unsloth_fixed is_llama_config is_decoder num_ctx
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj predict_special_tokens
    do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens num_beams num_beam_groups
    num_return_sequences repetition_penalty length_penalty diversity_penalty early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids remove_invalid_values exponential_decay_length_penalty
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
# what other decoders have, and its value where this one does not; None, false and what is empty are neutral besides
_NEUTRAL: dict[str, Container[Any]] = {
    "n_special": (0,),
    "activation": ("swiglu",),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "rope_ratio": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "use_rms_norm": (True,),
    "use_rope": (True,),
    "rotary": (True,),
    "is_causal": (True,),
    "causal": (True,),
    "position_embedding_type": ("rope", "rotary"),
}
# switches that are off only in another function
_FALSE_MATTERS = frozenset({"use_rms_norm", "use_rope", "rotary", "is_causal", "causal", "use_residual", "norm_before"})


def leaves_the_function(name: str, value: Any) -> bool:
    """Whether a setting that a family's reader does not ask for can be passed over."""
    if name.startswith("_") or name.endswith("_version") or name in _HARMLESS:
        return True
    if name in _NEUTRAL and value in _NEUTRAL[name]:
        return True
    return value is None or value in ({}, []) or (value is False and name not in _FALSE_MATTERS)
