"""APIs of vLLM that this package imports, overrides, replaces, calls or reads.

:mod:`mikv_vllm.compatibility` compares the list with vLLM's sources when MiKV starts.
``tests/test_compatibility.py`` compares it with this package's sources.
"""

FORWARD = "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"

MOVED = {
    "entrypoints/launchers/cli_args.py": "entrypoints/common/cli_args.py",
    "entrypoints/serve/utils/api_utils.py": "entrypoints/common/startup.py",
}
"""Files of vLLM 0.32 whose listed names are in another file in vLLM 0.33."""

VLLM_API: dict[str, dict[str, str | None]] = {
    "__init__.py": {"LLM": None, "RequestOutput": None, "SamplingParams": None},
    "_custom_ops.py": {
        "cpu_attn_reshape_and_cache": "key value key_cache value_cache slot_mapping isa",
    },
    "config/__init__.py": {
        "CUDAGraphMode": None,
        "ModelConfig": None,
        "VllmConfig": None,
        "get_layers_from_vllm_config": None,
    },
    "config/cache.py": {"CacheConfig.cache_dtype": None},
    "config/compilation.py": {"CUDAGraphMode.FULL": None},
    "config/device.py": {"DeviceConfig.device_type": None},
    "config/kernel.py": {"KernelConfig.enable_jit_warmup": None},
    "config/model.py": {
        "ModelConfig.dtype": None,
        "ModelConfig.get_head_size": "self",
        "ModelConfig.get_sliding_window": "self",
        "ModelConfig.hf_text_config": None,
        "ModelConfig.model": None,
        "ModelConfig.served_model_name": None,
    },
    "config/parallel.py": {"ParallelConfig.data_parallel_size": None},
    "config/scheduler.py": {
        "SchedulerConfig.async_scheduling": None,
        "SchedulerConfig.disable_hybrid_kv_cache_manager": None,
    },
    "config/utils.py": {"get_attr_docs": "cls"},
    "config/vllm.py": {
        "VllmConfig.additional_config": None,
        "VllmConfig.cache_config": None,
        "VllmConfig.device_config": None,
        "VllmConfig.kernel_config": None,
        "VllmConfig.kv_transfer_config": None,
        "VllmConfig.model_config": None,
        "VllmConfig.parallel_config": None,
        "VllmConfig.scheduler_config": None,
        "VllmConfig.speculative_config": None,
        "get_layers_from_vllm_config": "vllm_config layer_type",
    },
    "distributed/parallel_state.py": {
        "GroupCoordinator.is_first_rank": None,
        "get_pp_group": "",
        "get_tensor_model_parallel_rank": "",
    },
    "engine/arg_utils.py": {
        "AsyncEngineArgs": None,
        "EngineArgs.create_engine_config": "self usage_context headless",
        "EngineArgs.from_cli_args": "cls args",
    },
    "engine/protocol.py": {"EngineClient.vllm_config": None},
    "entrypoints/cli/serve.py": {"ServeSubcommand.cmd": "args"},
    "entrypoints/anthropic/api_router.py": {"translate_error_response": "response"},
    "entrypoints/launchers/cli_args.py": {
        "make_arg_parser": "parser",
        "validate_parsed_serve_args": "args",
    },
    "entrypoints/launchers/launcher.py": {"create_server_socket": "addr reuse_port"},
    "entrypoints/llm.py": {
        "LLM.__init__": "self model",
        "LLM.chat": "self messages sampling_params",
        "LLM.enqueue": "self prompts sampling_params",
        "LLM.generate": "self prompts sampling_params",
        "LLM.llm_engine": None,
        "LLM.sleep": "self level",
        "LLM.wait_for_completion": "self",
        "LLM.wake_up": "self tags",
    },
    "entrypoints/serve/exception_handling/error_response.py": {"create_error_response": "message"},
    "entrypoints/serve/middleware/authenticate.py": {
        "AuthenticationMiddleware.verify_token": "self headers",
    },
    "entrypoints/serve/utils/api_utils.py": {"cli_env_setup": ""},
    "envs.py": {"VLLM_API_KEY": None},
    "exceptions.py": {"VLLMValidationError": None},
    "logger.py": {"configure_logging_from_args": "args", "init_logger": "name"},
    "logits_process.py": {"LogitsProcessor": None},
    "model_executor/layers/attention/__init__.py": {"Attention": None},
    "model_executor/layers/attention/attention.py": {"Attention": None},
    "outputs.py": {"RequestOutput": None},
    "platforms/__init__.py": {"current_platform": None},
    "sampling_params.py": {"SamplingParams.extra_args": None, "SamplingParams.stop": None},
    "usage/usage_lib.py": {"UsageContext.LLM_CLASS": None, "UsageContext.OPENAI_API_SERVER": None},
    "utils/argparse_utils.py": {
        "FlexibleArgumentParser._search_keyword": None,
        "FlexibleArgumentParser.add_argument_group": "self",
        "FlexibleArgumentParser.format_help": "self",
        "FlexibleArgumentParser.load_config_file": "self file_path",
        "FlexibleArgumentParser.parse_args": "self args namespace",
    },
    "utils/cpu_resource_utils.py": {
        "MemoryNodeInfo.available_memory": None,
        "get_allowed_cpu_list": "",
        "get_memory_node_info": "node_id",
    },
    "utils/torch_utils.py": {"async_tensor_h2d": "data device"},
    "v1/attention/backend.py": {
        "AttentionBackend.customize_spec": "cls spec",
        "AttentionBackend.supported_kv_cache_layouts": "cls",
        "AttentionCGSupport": None,
        "AttentionImpl.forward": FORWARD,
        "AttentionImpl.fused_output_quant_supported": "self quant_key",
        "AttentionImplBase.head_size": None,
        "AttentionImplBase.num_heads": None,
        "AttentionImplBase.scale": None,
        "AttentionLayer": None,
        "AttentionMetadataBuilder._cudagraph_support": None,
        "AttentionMetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
        "AttentionMetadataBuilder.device": None,
        "AttentionMetadataBuilder.get_cudagraph_support": "cls vllm_config kv_cache_spec",
        "AttentionMetadataBuilder.kv_cache_spec": None,
        "AttentionMetadataBuilder.supports_update_block_table": None,
        "CommonAttentionMetadata.block_table_tensor": None,
        "CommonAttentionMetadata.query_start_loc": None,
        "CommonAttentionMetadata.seq_lens": None,
        "CommonAttentionMetadata.slot_mapping": None,
    },
    "v1/attention/backends/cpu_attn.py": {
        "CPUAttentionBackend.get_builder_cls": "",
        "CPUAttentionBackend.get_impl_cls": "",
        "CPUAttentionBackendImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
        "CPUAttentionBackendImpl.forward": FORWARD,
        "CPUAttentionBackendImpl.head_size": None,
        "CPUAttentionBackendImpl.logits_soft_cap": None,
        "CPUAttentionBackendImpl.num_heads": None,
        "CPUAttentionBackendImpl.num_kv_heads": None,
        "CPUAttentionBackendImpl.scale": None,
        "CPUAttentionBackendImpl.sinks": None,
        "CPUAttentionMetadata": None,
        "CPUAttentionMetadataBuilder.block_size": None,
        "CPUAttentionMetadataBuilder.build": (
            "self common_prefix_len common_attn_metadata fast_build"
        ),
        "CPUAttentionMetadataBuilder.kv_cache_spec": None,
    },
    "v1/attention/backends/flash_attn.py": {
        "FlashAttentionBackend.get_builder_cls": "",
        "FlashAttentionBackend.get_impl_cls": "",
        "FlashAttentionImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
        "FlashAttentionImpl.forward": FORWARD,
        "FlashAttentionImpl.head_size": None,
        "FlashAttentionImpl.logits_soft_cap": None,
        "FlashAttentionImpl.num_heads": None,
        "FlashAttentionImpl.num_kv_heads": None,
        "FlashAttentionImpl.scale": None,
        "FlashAttentionImpl.sinks": None,
        "FlashAttentionMetadataBuilder._cudagraph_support": None,
        "FlashAttentionMetadataBuilder.build": (
            "self common_prefix_len common_attn_metadata fast_build"
        ),
        "FlashAttentionMetadataBuilder.get_cudagraph_support": "cls vllm_config kv_cache_spec",
        "FlashAttentionMetadataBuilder.supports_update_block_table": None,
    },
    "v1/attention/backends/registry.py": {
        "AttentionBackendEnum.CPU_ATTN": None,
        "AttentionBackendEnum.FLASHINFER": None,
        "AttentionBackendEnum.FLASH_ATTN": None,
        "AttentionBackendEnum.TRITON_ATTN": None,
        "register_backend": "backend class_path",
    },
    "v1/attention/backends/triton_attn.py": {
        "TritonAttentionBackend.customize_spec": "cls spec",
        "TritonAttentionBackend.get_builder_cls": "",
        "TritonAttentionBackend.get_impl_cls": "",
        "TritonAttentionImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
        "TritonAttentionImpl.forward": FORWARD,
        "TritonAttentionImpl.fused_output_quant_supported": "self quant_key",
        "TritonAttentionImpl.head_size": None,
        "TritonAttentionImpl.logits_soft_cap": None,
        "TritonAttentionImpl.num_heads": None,
        "TritonAttentionImpl.num_kv_heads": None,
        "TritonAttentionImpl.scale": None,
        "TritonAttentionImpl.sinks": None,
        "TritonAttentionMetadataBuilder._cudagraph_support": None,
        "TritonAttentionMetadataBuilder.build": (
            "self common_prefix_len common_attn_metadata fast_build"
        ),
    },
    "v1/core/block_pool.py": {
        "BlockPool.evict_blocks": "self block_ids",
        "BlockPool.free_block_queue": None,
        "BlockPool.free_blocks": "self ordered_blocks",
        "BlockPool.get_new_blocks": "self num_blocks",
        "BlockPool.get_num_free_blocks": "self",
        "BlockPool.hash_block_size": None,
        "BlockPool.num_gpu_blocks": None,
        "BlockPool.touch": "self blocks",
    },
    "v1/core/kv_cache_coordinator.py": {
        "KVCacheCoordinator.find_longest_cache_hit": "self block_hashes max_cache_hit_length",
        "KVCacheCoordinator.single_type_managers": None,
    },
    "v1/core/kv_cache_manager.py": {
        "KVCacheBlocks": None,
        "KVCacheBlocks.blocks": None,
        "KVCacheManager.allocate_slots": "self request num_new_tokens",
        "KVCacheManager.coordinator": None,
        "KVCacheManager.create_kv_cache_blocks": "self blocks",
        "KVCacheManager.empty_kv_cache_blocks": None,
    },
    "v1/core/kv_cache_utils.py": {
        "BlockHash": None,
        "FreeKVCacheBlockQueue.fake_free_list_head": None,
        "FreeKVCacheBlockQueue.prepend_n": "self blocks",
        "FreeKVCacheBlockQueue.remove": "self block",
        "KVCacheBlock.block_id": None,
        "KVCacheBlock.is_null": None,
        "KVCacheBlock.next_free_block": None,
        "KVCacheBlock.ref_cnt": None,
    },
    "v1/core/sched/async_scheduler.py": {"AsyncScheduler.__init__": "self"},
    "v1/core/sched/output.py": {
        "SchedulerOutput.finished_req_ids": None,
        "SchedulerOutput.num_scheduled_tokens": None,
        "SchedulerOutput.preempted_req_ids": None,
        "SchedulerOutput.scheduled_spec_decode_tokens": None,
    },
    "v1/core/sched/scheduler.py": {
        "Scheduler.__init__": (
            "self vllm_config kv_cache_config structured_output_manager block_size"
        ),
        "Scheduler._free_request": "self request delay_free_blocks",
        "Scheduler._get_local_prefix_cache_hit": "self request",
        "Scheduler._preempt_request": "self request timestamp",
        "Scheduler._reserve_prefill_lookahead": "self request num_computed_tokens num_new_tokens",
        "Scheduler.add_request": "self request",
        "Scheduler.block_size": None,
        "Scheduler.cache_config": None,
        "Scheduler.kv_cache_config": None,
        "Scheduler.kv_cache_manager": None,
        "Scheduler.make_stats": "self",
        "Scheduler.max_model_len": None,
        "Scheduler.num_spec_tokens": None,
        "Scheduler.parallel_config": None,
        "Scheduler.requests": None,
        "Scheduler.running": None,
        "Scheduler.reset_prefix_cache": "self reset_running_requests reset_connector",
        "Scheduler.schedule": "self throttle_prefills",
        "Scheduler.update_from_output": "self scheduler_output model_runner_output",
        "Scheduler.vllm_config": None,
    },
    "v1/core/single_type_kv_cache_manager.py": {
        "FullAttentionManager.cache_blocks": "self request num_tokens replay_boundaries",
        "SingleTypeKVCacheManager.__init__": (
            "self kv_cache_spec block_pool enable_caching kv_cache_group_id scheduler_block_size"
        ),
        "SingleTypeKVCacheManager.allocate_new_blocks": (
            "self request_id num_tokens num_tokens_main_model"
        ),
        "SingleTypeKVCacheManager.add_local_computed_blocks": (
            "self request_id new_computed_blocks num_local_computed_tokens "
            "num_external_computed_tokens"
        ),
        "SingleTypeKVCacheManager.block_pool": None,
        "SingleTypeKVCacheManager.block_size": None,
        "SingleTypeKVCacheManager.cache_blocks": "self request num_tokens replay_boundaries",
        "SingleTypeKVCacheManager.enable_caching": None,
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate": (
            "self request_id num_tokens new_computed_blocks total_computed_tokens "
            "num_local_computed_tokens num_tokens_main_model"
        ),
        "SingleTypeKVCacheManager.kv_cache_spec": None,
        "SingleTypeKVCacheManager.pop_blocks_for_free": "self request_id",
        "SingleTypeKVCacheManager.req_to_blocks": None,
        "SingleTypeKVCacheManager.num_cached_block": None,
    },
    "v1/cudagraph_dispatcher.py": {
        "CudagraphDispatcher.dispatch": (
            "self num_tokens uniform_decode has_lora num_active_loras valid_modes invalid_modes"
        ),
    },
    "v1/engine/__init__.py": {
        "EngineCoreOutput": None,
        "EngineCoreOutputs": None,
        "EngineCoreRequest.prompt_token_ids": None,
        "EngineCoreRequest.request_id": None,
        "EngineCoreRequest.resumable": None,
        "EngineCoreRequest.sampling_params": None,
    },
    "v1/engine/async_llm.py": {"AsyncLLM.add_request": "self request_id prompt params"},
    "v1/engine/core_client.py": {"AsyncMPClient.call_utility_all_async": "self method"},
    "v1/engine/input_processor.py": {
        "InputProcessor.process_inputs": "self request_id prompt params supported_tasks",
        "InputProcessor.process_inputs_async": None,
    },
    "v1/engine/output_processor.py": {
        "OutputProcessor.add_request": "self request prompt",
        "OutputProcessor.process_outputs": "self engine_core_outputs",
        "OutputProcessor.request_states": None,
        "RequestState.parent_req": None,
    },
    "v1/kv_cache_interface.py": {
        "AttentionSpec.dtype": None,
        "AttentionSpec.head_size": None,
        "AttentionSpec.head_size_v": None,
        "AttentionSpec.page_size_bytes": None,
        "FullAttentionSpec.max_memory_usage_bytes": "self vllm_config",
        "FullAttentionSpec.merge": "cls specs",
        "KVCacheConfig.num_blocks": None,
        "KVCacheSpec.block_size": None,
        "KVCacheSpec.is_uniform_with_collection": "self kv_cache_specs",
        "replace_as": "spec target_cls",
    },
    "v1/kv_cache_layout.py": {
        "KVCacheLayout.BHLNC": None,
        "KVCacheLayout.BLHNC": None,
        "KVCacheLayout.LBHNC": None,
        "KVCacheLayout.LHBNC": None,
    },
    "v1/kv_cache_spec_registry.py": {"register_kv_cache_spec": ""},
    "v1/metrics/loggers.py": {
        "AggregateStatLoggerBase.__init__": "self vllm_config engine_indexes",
        "StatLoggerBase.log_engine_initialized": "self",
        "StatLoggerBase.record": "self scheduler_stats iteration_stats mm_cache_stats engine_idx",
        "StatLoggerManager.engine_indexes": None,
        "StatLoggerManager.stat_loggers": None,
    },
    "v1/metrics/stats.py": {"SchedulerStats.kv_connector_stats": None},
    "v1/outputs.py": {"ModelRunnerOutput": None},
    "v1/request.py": {
        "Request.all_token_ids": None,
        "Request.block_hashes": None,
        "Request.is_prefill_chunk": None,
        "Request.max_tokens": None,
        "Request.mm_features": None,
        "Request.num_computed_tokens": None,
        "Request.num_prompt_tokens": None,
        "Request.num_tokens": None,
        "Request.request_id": None,
        "Request.resumable": None,
        "Request.sampling_params": None,
    },
    "v1/sample/logits_processor/__init__.py": {
        "AdapterLogitsProcessor.new_req_logits_processor": "self params",
    },
    "v1/sample/logits_processor/interface.py": {"LogitsProcessor.is_argmax_invariant": "self"},
    "v1/worker/cpu_worker.py": {"CPUWorker.init_device": "self", "CPUWorker.model_runner": None},
    "v1/worker/gpu/cudagraph_utils.py": {
        "CudaGraphManager.dispatch": (
            "self num_reqs num_tokens uniform_token_count num_active_loras max_query_len"
        ),
    },
    "v1/worker/gpu/input_batch.py": {"InputBatch.req_ids": None},
    "v1/worker/gpu/model_runner.py": {"GPUModelRunner.prepare_attn": "self input_batch"},
    "v1/worker/gpu_input_batch.py": {"InputBatch.generators": None, "InputBatch.req_ids": "self"},
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner.cudagraph_dispatcher": None,
        "GPUModelRunner.discard_request_mask": None,
        "GPUModelRunner.input_batch": None,
        "GPUModelRunner.intermediate_tensors": None,
        "GPUModelRunner.kv_caches": None,
    },
    "v1/worker/gpu_worker.py": {
        "Worker.compile_or_warm_up_model": "self",
        "Worker.determine_available_memory": "self",
        "Worker.execute_model": "self scheduler_output",
        "Worker.get_kv_cache_spec": "self",
        "Worker.init_device": "self",
        "Worker.initialize_from_config": "self kv_cache_config",
        "Worker.model_runner": None,
        "Worker.sample_tokens": "self grammar_output",
        "Worker.use_v2_model_runner": None,
    },
    "v1/worker/worker_base.py": {
        "WorkerBase.cache_config": None,
        "WorkerBase.model_config": None,
        "WorkerBase.vllm_config": None,
    },
}
"""APIs by file below the folder of ``vllm``, then by name: a function, class or variable, or
``Class.member``. The value lists the parameters that MiKV passes, in this order; it is None for an
API that MiKV does not call. vLLM may add parameters that have a default. A class of which members
are listed has no entry of its own."""
