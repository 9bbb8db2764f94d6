"""Which arguments of a Megatron-LM run change the function of its model, and which leave it alone.

A checkpoint carries every argument of its run. Each is in exactly one list: `REPRESENTED` has a setting of ours,
`NEUTRAL` (with the families of names in `_NEUTRAL_PREFIXES`) never changes logits, `REFUSED` changes them unless it has
a value that does not. An argument in no list may mean anything, so it is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

# read by the importers of both codes
_REPRESENTED_NAMES = """
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups
    kv_channels max_position_embeddings position_embedding_type use_rotary_position_embeddings
    add_position_embedding rotary_percent rotary_base rotary_interleaved rotary_seq_len_interpolation_factor
    use_rope_scaling rope_scaling_factor normalization apply_layernorm_1p norm_epsilon layernorm_epsilon
    qk_layernorm swiglu squared_relu openai_gelu bias_gelu_fusion bias_swiglu_fusion add_bias_linear
    add_qkv_bias untie_embeddings_and_output_weights tensor_model_parallel_size pipeline_model_parallel_size
    retro_add_retriever retro_chunk_length retro_gpt_chunk_length retro_num_neighbors retro_num_retrieved_chunks
    retro_attention_gate retro_encoder_layers retro_encoder_num_layers
"""
REPRESENTED = frozenset(_REPRESENTED_NAMES.split())
# the values with which each leaves the function alone
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (False, None),
    "onnx_safe": (False, None),
    "quick_geglu": (False, None),
    "use_te_activation_func": (False, None),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0, None),
    "softmax_type": ("vanilla", None),
    "window_size": (None,),
    "window_attn_skip_freq": (None,),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "rope_type": (None, "rope"),
    "multi_latent_attention": (False, None),
    "qk_l2_norm": (False, None),
    "qk_clip": (False, None),
    "attention_output_gate": (False, None),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "num_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "decoder_num_layers": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "is_hybrid_model": (False, None),
    "hybrid_attention_ratio": (0.0, None),
    "hybrid_mlp_ratio": (0.0, None),
    "hybrid_override_pattern": (None,),
    "hybrid_layer_pattern": (None,),
    "spec": (None, ["local"]),
    "yaml_cfg": (None,),
    "use_kitchen": (False, None),
    "kitchen_config_file": (None,),
    "kitchen_recipe_number": (None,),
    "biencoder_projection_dim": (0, None),
    "vision_pretraining": (False, None),
    "ict_head_size": (None,),
    "use_mup": (False, None),
    "mup_embedding_mult": (1.0, None),
    "mup_output_mult": (1.0, None),
    "mup_attn_scale_power": (0.5, None),
    "num_residual_streams": (None, 1),
    "enable_hyper_connections": (False, None),
}
# families of names that belong to training, speed, logs, tokenizers, and to models that REFUSED keeps out
_PREFIXES = """
    moe_ mamba_ mtp_ dino_ biencoder_ retriever_ indexer_ inference_ inprocess_ ckpt_ dist_ckpt_ non_persistent_
    ddp_ tp_comm_ log_ wandb_ one_logger_ app_tag_ fp8_ fp4_ muon_ grpo_ rl_ langrl_ cuda_graph_ tiktoken_ lr_
    nccl_ profile_ straggler_ tensorboard_ timing_ swin_ vision_ recompute_ error_injection_ replication
    retro_gpt_ retro_bert_ retro_index_ retro_query_ retro_task retro_doc_ retro_block_ consumed_ skipped_
    export_
"""
_NEUTRAL_PREFIXES = tuple(_PREFIXES.split())
_NEUTRAL_NAMES = """
    DDP_impl accumulate_allreduce_grads_in_fp32 account_for_embedding_in_pipeline_split adam_beta1 adam_beta2
    adam_eps account_for_loss_in_pipeline_split adlr_autoresume adlr_autoresume_interval align_grad_reduce
    align_param_gather allow_ambiguous_pad_tokens apply_query_key_layer_scaling apply_rope_fusion async_save
    attention_backend async_tensor_model_parallel_allreduce attention_dropout attention_softmax_in_fp32
    auto_detect_ckpt_format barrier_with_L1_time barrier_with_level_1_timing batch_size bert_binary_head
    bert_embedder_type bert_load bf16 bias_dropout_fusion blendable_index_path block_data_path cache_mla_latents
    calc_ft_timeouts calculate_per_token_loss check_for_large_grads check_for_nan_in_loss_and_grad
    check_for_spiky_loss check_weight_hash_across_dp_replicas_interval checkpoint_activations classes_fraction
    clip_grad clone_scatter_output_in_embedding config_logger_dir context_parallel_size cp_comm_type
    cpu_offloading_num_layers create_attention_mask_in_dataloader cross_entropy_fusion_impl
    cross_entropy_loss_fusion curr_iteration data_args_path data_cache_path data_impl data_parallel_random_init
    data_parallel_sharding_strategy data_parallel_size data_path data_per_class_fraction data_sharding
    dataloader_type dataset_impl decode_only_cuda_graphs decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers decoder_seq_length decoupled_lr decoupled_min_lr
    decrease_batch_size_if_needed defer_embedding_wgrad_compute delay_grad_reduce delay_param_gather
    delay_wgrad_compute deprecated_use_mcore_models deterministic_mode disable_bf16_reduced_precision_matmul
    disable_chunked_prefill disable_mamba_mem_eff_path disable_straggler_on_startup
    disable_symmetric_registration distrib_optim_fully_reshardable_mem_efficient distribute_saved_activations
    distributed_backend distributed_timeout_minutes distributed_timeout_seconds_after_init do_test do_train
    do_valid drop_path_rate dump_param_to_param_group_map embedding_init_method_std embedding_path
    embedding_weights_in_fp32 empty_unused_memory_level enable_cuda_graph enable_experimental enable_ft_package
    enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc enable_one_logger encoder_num_layers
    encoder_seq_length encoder_pipeline_model_parallel_size encoder_tensor_model_parallel_size end_weight_decay
    eod_mask_loss eval_interval eval_iters evidence_data_path exit_duration_in_mins exit_interval
    exit_on_missing_checkpoint exit_signal_handler exp_avg_dtype exp_avg_sq_dtype expert_model_parallel_size
    expert_parallel expert_tensor_parallel_size external_cuda_graph finetune first_last_layers_bf16 flash_decode
    fp16 fp16_lm_cross_entropy fp32_residual_connection fp4 fp8 fsdp_double_buffer full_validation glob_batch
    global_batch_size glu_fusion grad_reduce_in_bf16 gradient_accumulation_fusion gradient_reduce_div_fusion
    head_lr_mult hidden_dropout hierarchical_context_parallel_sizes high_priority_stream_groups hysteresis
    ict_load img_h img_w init_method_std init_method_xavier_uniform init_model_with_meta_device
    initial_loss_scale iter_per_epoch iteration iterations_to_skip keep_fp8_transpose_cache keep_last
    kv_lora_rank lazy_mpu_init legacy_tokenizer load load_main_params_from_ckpt local_rank logging_level
    loss_scale loss_scale_window lr main_grads_dtype main_params_dtype make_vocab_size_divisible_by manual_gc
    manual_gc_eval manual_gc_interval mask_factor mask_prob mask_type masked_softmax_fusion max_tokens_to_oom
    memory_snapshot_path merge_file micro_batch_size microbatch_group_size_per_vp_stage
    mid_level_dataset_surplus min_loss_scale min_lr mlp_chunks_for_prefill mmap_bin_files mmap_warmup mock_data
    model_parallel_size model_type mscale mscale_all_dim multiple_validation_sets nccl_ub no_load_optim
    no_load_rng no_persist_layer_norm no_save_optim no_save_rng num_channels num_classes
    num_dataset_builder_threads num_distributed_optimizer_instances num_floating_point_operations_so_far
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank num_workers object_storage_cache_path optimizer optimizer_cpu_offload
    optimizer_offload_fraction output_bert_embeddings overlap_cpu_optimizer_d2h_h2d overlap_grad_reduce
    overlap_moe_expert_parallel_comm overlap_p2p_comm overlap_p2p_comm_warmup_flush overlap_param_gather
    overlap_param_gather_with_optimizer_step override_opt_param_scheduler padded_vocab_size params_dtype
    patch_dim per_split_data_args_path perform_initialization perform_rl_step phase_transition_iterations
    pin_cpu_grads pin_cpu_params pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
    pipeline_model_parallel_split_rank pretrained_checkpoint profile q_lora_rank qk_head_dim qk_pos_emb_head_dim
    query_in_block_prob rampup_batch_size rank record_memory_history relative_attention_max_distance
    relative_attention_num_buckets rerun_mode reset_attention_mask reset_position_ids
    result_rejected_tracker_filename retro_cyclic_train_iters retro_encoder_attention_dropout
    retro_encoder_hidden_dropout retro_nchunks_sampled retro_project_dir retro_return_doc_ids
    retro_verify_neighbor_count retro_workdir retro_neighbor_dirs retro_config reuse_grad_buf_for_mxfp8_param_ag
    rotary_scaling_factor run_workload_inspector_server sample_rate save save_interval save_retain_interval
    scatter_gather_tensors_in_pipeline seed seq_length sequence_parallel sft sft_tokenizer_prompt_format
    sgd_momentum sharp_enabled_group short_seq_prob skip_train split standalone_embedding_stage
    start_weight_decay strict_fsdp_dtensor_load suggested_communication_unit_size symmetric_ar_type
    te_rng_tracker test_data_path test_mode titles_data_path tokenizer_metadata tokenizer_model tokenizer_type
    torch_fsdp2_reshard_after_forward train_data_path train_iters train_samples train_sync_interval
    transformer_impl transformer_pipeline_model_parallel_size trust_remote_code use_bias_glu_fusion
    use_checkpoint_args use_checkpoint_opt_param_scheduler use_contiguous_buffers_in_local_ddp
    use_cpu_initialization use_dist_ckpt use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn
    use_fused_weighted_squared_relu use_legacy_models use_legacy_static_engine use_mcore_models
    use_megatron_fsdp use_mp_args_from_checkpoint_args use_one_sent_docs use_persistent_ckpt_worker
    use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p use_sharp
    use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 use_torch_optimizer_for_cpu_offload
    use_tp_pp_dp_mapping v_head_dim valid_data_path variable_seq_lengths virtual_pipeline_model_parallel_size
    vocab_extra_ids vocab_file vocab_size warmup weight_decay weight_decay_incr_style weight_hash
    wgrad_deferral_limit world_size
"""
NEUTRAL = frozenset(_NEUTRAL_NAMES.split())


def argument_problems(arguments: Mapping[str, Any], known_neutral: Collection[str] = ()) -> Iterator[str]:
    """Each argument that may change the function and has no setting of ours, in words."""
    for name, value in sorted(arguments.items()):
        if name in REPRESENTED or is_neutral(name) or name in known_neutral:
            continue
        if name not in REFUSED:
            yield f"{name} = {value!r} is an argument that is not known here"
        elif not any(type(value) is type(neutral) and value == neutral for neutral in REFUSED[name]):
            neutral = " or ".join(repr(each) for each in REFUSED[name])
            yield f"{name} = {value!r} gives another function (expected {neutral})"


def is_neutral(name: str) -> bool:
    """Whether an argument never changes the function."""
    listed = name in REPRESENTED or name in REFUSED
    return name in NEUTRAL or (not listed and name.startswith(_NEUTRAL_PREFIXES))
