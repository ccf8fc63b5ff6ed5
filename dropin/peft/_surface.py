"""The public names of PEFT 0.21.2 by module, and what others are known to use beside them: names, nothing else."""

from __future__ import annotations


def targets(method: str) -> str:
    """The table of a method's targets by model type."""
    return f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING"


def method(
    package: str, names: str, config: str = "", layer: str = "F", model: str = "", **modules: str
) -> dict[str, str]:
    """A method's package and its modules: each name of the package is in one of them, beside what is given here."""
    parts = {"config": [config], "layer": [layer], "model": [model, targets(package.replace("_", "").upper())]}
    elsewhere = " ".join(modules.values()).split()
    for name in names.split():
        if name not in elsewhere:
            part = "config" if name.endswith("Config") else "model" if name.endswith("Model") else "layer"
            parts[part].append(name)
    modules |= {part: " ".join(found) for part, found in parts.items()}
    room = f"peft.tuners.{package}"
    return {room: names} | {f"{room}.{name}": modules[name] for name in sorted(modules)}


# names that several modules have
AUTO = (
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification "
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"
)
HANDLES = (
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
)
TUNERS = (
    "AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig "
    "BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding "
    "CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig "
    "FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HRAConfig HRAModel "
    "HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig "
    "LoHaModel LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig MissConfig "
    "MissModel MontecloraConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig "
    "OSFModel PeanutConfig PeanutModel PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding "
    "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit "
    "PsoftConfig PsoftModel PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig "
    "ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel TinyLoraConfig TinyLoraModel "
    "TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeloraConfig "
    "VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel convert_to_lora create_arrow_model "
    "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora"
)
TABLES = (
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HRA IA3 LILY LNTUNING LOHA LOKR LORA MISS "
    "OFT PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT"
)
TARGETS = " ".join(map(targets, TABLES.split()))
CONSTANTS = (
    "CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME "
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
    "WEIGHTS_NAME bloom_model_postprocess_past_key_value"
)
UTILS = (
    "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper _freeze_adapter _get_batch_size "
    "_get_input_embeddings_name _get_submodules _is_valid_match _prepare_prompt_learning_config _set_adapter "
    "_set_trainable cast_mixed_precision_params get_gptqmodel_quant_linear get_pattern_key get_quantization_config "
    "id_tensor_storage infer_device prepare_model_for_kbit_training set_additional_trainable_modules "
    "shift_tokens_right transpose"
)

SURFACE: dict[str, str] = {
    "peft": (
        f"{TUNERS} {AUTO} {HANDLES} NoMatchingPeftModuleError PEFT_TYPE_TO_CONFIG_MAPPING "
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeftConfig PeftError PeftMixedModel PeftType "
        "PeftWarning PromptLearningConfig TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType "
        "bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters "
        "find_kappa_target_modules get_base_model_state_dict get_layer_status get_model_status get_peft_config "
        "get_peft_model get_peft_model_state_dict initialize_kv_prefix_from_past_key_values "
        "initialize_kv_prefix_from_text inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training "
        "prompt_embeddings_from_past_key_values replace_lora_weights_loftq set_base_model_state_dict "
        "set_peft_model_state_dict shift_tokens_right"
    ),
    "peft.auto": f"{AUTO} TOKENIZER_CONFIG_NAME check_import_allowlist get_default_import_allowlist",
    "peft.config": "CONFIG_NAME MIN_EXPECTED_CONFIG_KEYS PeftConfig PeftConfigMixin PromptLearningConfig",
    "peft.functional": (
        "cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model set_adapter "
        "set_peft_model_state_dict set_requires_grad"
    ),
    "peft.helpers": (
        "DoraCaching KappaTuneSelector MontecloraTrainerMixin check_if_peft_model disable_input_dtype_casting "
        "find_kappa_target_modules rescale_adapter_scale update_forward_signature update_generate_signature "
        "update_signature"
    ),
    "peft.import_utils": (
        "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
        "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available "
        "is_te_pytorch_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0 "
        "is_transformers_ge_v5 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_transformers_ge_v5_1_0 "
        "is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 is_transformers_le_4_53 is_xpu_available"
    ),
    "peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING TYPE_CHECKING get_peft_config inject_adapter_in_model"
    ),
    "peft.mapping_func": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING TYPE_CHECKING "
        "get_peft_model"
    ),
    "peft.mixed_model": "DUMMY_MODEL_CONFIG PeftMixedModel",
    "peft.optimizers": "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    "peft.optimizers.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
    "peft.optimizers.loraplus": "ALL_LAYERNORM_LAYERS create_loraplus_optimizer",
    "peft.optimizers.riemannian": "create_riemannian_optimizer",
    "peft.peft_model": (
        f"{HANDLES} DUMMY_MODEL_CONFIG PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING SAFETENSORS_WEIGHTS_NAME "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TunerLayerStatus TunerModelStatus WEIGHTS_NAME "
        "get_layer_status get_model_status"
    ),
    "peft.tuners": f"{TUNERS} MixedModel MultitaskPromptEmbedding",
    "peft.tuners._buffer_dict": "BufferDict",
    **method(
        "adalora",
        (
            "AdaLoraConfig AdaLoraLayer AdaLoraModel RankAllocator SVDConv2d SVDLinear SVDLinear4bit SVDLinear8bitLt "
            "SVDQuantLinear"
        ),
        bnb="SVDLinear4bit SVDLinear8bitLt",
        gptq="SVDQuantLinear",
        layer="",
    ),
    **method(
        "adamss",
        "AdamssConfig AdamssLayer AdamssModel Linear",
        asa_callback="AdamssAsaCallback",
        utils="clustering_Z get_trainable_subspaces seg_locations slice_pca",
    ),
    "peft.tuners.adaption_prompt": "AdaptedAttention AdaptionPromptConfig AdaptionPromptModel",
    "peft.tuners.adaption_prompt.config": (
        "AdaptionPromptConfig ModelTypeConfig TRANSFORMERS_MODEL_CONFIG prepare_config"
    ),
    "peft.tuners.adaption_prompt.layer": "AdaptedAttention AdaptedAttentionGPT F TRANSFORMERS_MODEL_CONFIG",
    "peft.tuners.adaption_prompt.model": "AdaptionPromptModel",
    "peft.tuners.adaption_prompt.utils": (
        "gpt2_compute_query_states is_adaption_prompt_trainable llama_apply_rotary_pos_emb "
        "llama_compute_query_states llama_rotate_half"
    ),
    **method("beft", "BeftConfig BeftLayer BeftModel Linear", layer=""),
    **method(
        "boft",
        "BOFTConfig BOFTLayer BOFTModel",
        fbd="",
        layer="Conv2d F FastBlockDiag Linear MultiplicativeDropoutLayer get_fbd_cuda patch_environment",
    ),
    **method(
        "c3a", "C3AConfig C3ALayer C3ALinear C3AModel", layer="", utils="BlockCircularConvolution get_circulant_fast"
    ),
    "peft.tuners.cartridge": "CartridgeConfig CartridgeEncoder",
    "peft.tuners.cartridge.config": "CartridgeConfig",
    "peft.tuners.cartridge.model": "CartridgeEncoder",
    "peft.tuners.cartridge.utils": (
        "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
        "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values"
    ),
    "peft.tuners.cpt": "CPTConfig CPTEmbedding",
    "peft.tuners.cpt.config": "CPTConfig",
    "peft.tuners.cpt.model": "CPTEmbedding",
    **method("deft", "DeftConfig DeftLayer DeftLinear DeftModel"),
    **method("delora", "DeloraConfig DeloraLayer DeloraLinear DeloraModel", layer=""),
    **method("fourierft", "FourierFTConfig FourierFTLayer FourierFTLinear FourierFTModel"),
    **method("frod", "FrodConfig FrodLayer FrodModel Linear"),
    **method(
        "glora",
        "GloraConfig GloraLayer GloraLinear GloraModel",
        layer="F GloraEmptyPath GloraLoraPath GloraPath GloraScalarPath GloraVectorPath",
    ),
    **method("gralora", "GraloraConfig GraloraLayer GraloraModel", layer="Linear"),
    **method(
        "hira",
        "Conv2d Conv3d Embedding HiraConfig HiraLayer HiraModel Linear Linear4bit Linear8bitLt",
        bnb="F Linear4bit Linear8bitLt dispatch_bnb_4bit dispatch_bnb_8bit",
        layer="Conv1d F dispatch_default",
    ),
    **method("hra", "HRAConfig HRAConv2d HRALayer HRALinear HRAModel"),
    **method(
        "ia3",
        "Conv2d Conv3d IA3Config IA3Layer IA3Model Linear Linear4bit Linear8bitLt",
        bnb="Linear4bit Linear8bitLt",
        layer="",
        model="TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    ),
    **method("lily", "LilyConfig LilyLayer LilyModel Linear"),
    **method("ln_tuning", "LNTuningConfig LNTuningModel", layer="LNTuningLayer"),
    **method(
        "loha",
        "Conv2d Linear LoHaConfig LoHaLayer LoHaModel",
        layer="Conv1d F HadaWeight HadaWeightCP make_weight make_weight_cp",
    ),
    **method(
        "lokr", "Conv2d Linear LoKrConfig LoKrLayer LoKrModel", layer="Conv1d F factorization make_kron make_weight_cp"
    ),
    **method(
        "lora",
        (
            "ArrowConfig BdLoraConfig Conv2d Conv3d Embedding EvaConfig GPTQLoraLinear KasaConfig Linear Linear4bit "
            "Linear8bitLt LoftQConfig LoraConfig LoraGAConfig LoraLayer LoraModel LoraRuntimeConfig MontecloraConfig "
            "ParamWrapper VeloraConfig convert_to_lora create_arrow_model get_eva_state_dict "
            "initialize_lora_eva_weights preprocess_loraga save_as_lora"
        ),
        aqlm="AqlmLoraLinear dispatch_aqlm",
        arrow=(
            "ArrowLoraLinearLayer GKS_ADAPTER_PREFIX TASK_ADAPTER_PREFIX check_loaded_lora_compatibility_arrow "
            "create_arrow_model ensure_adapters_target_linear_layers_only"
        ),
        awq="AwqLoraLinear dispatch_awq",
        bnb="Linear4bit Linear8bitLt VARIANT_KWARG_KEYS dispatch_bnb_4bit dispatch_bnb_8bit",
        config="CordaConfig",
        conversion="SAFETENSORS_WEIGHTS_NAME convert_to_lora save_as_lora",
        corda="CordaConfig preprocess_corda",
        dora=(
            "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer ENABLE_DORA_CACHING "
            "F cache_decorator dequantize_module_weight"
        ),
        eetq="dispatch_eetq",
        eva=(
            "HashHook MIN_TARGET_MODULES_FOR_OPTIMIZATION SVDHook UNSUPPORTED_LORA_MODULES find_equal_values "
            "forward_fn_dict get_device_with_meta_params get_eva_state_dict initialize_lora_eva_weights "
            "move_inputs_to_device prepare_layer_inputs_fn_language_modeling "
            "prepare_model_inputs_fn_language_modeling"
        ),
        gptq="GPTQLoraLinear dispatch_gptq",
        hqq="dispatch_hqq",
        inc="dispatch_inc",
        intruders="reduce_intruder_dimension",
        layer=(
            "ALLOWED_COMPUTE_DTYPES Conv1d F LoraEmbeddingATPHolder LoraVariant MultiheadAttention UPCAST_DTYPES "
            "VARIANT_KWARG_KEYS _LoraParameterProxy check_adapters_to_merge dispatch_default transpose"
        ),
        loraga="estimate_gradients get_model_device get_target_modules preprocess_loraga",
        model="add_lora_tp_hooks_dtensor get_tp_plan_and_mesh",
        monteclora="BufferedMontecloraSampler MontecloraSampler",
        te="TeLinear dispatch_transformer_engine",
        torchao="TorchaoLoraLinear dispatch_torchao",
        tp_layer="LoraParallelLinear dispatch_megatron get_default_module_allowlist",
        variants=(
            "ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant BlockDiagonalLinear DoraConv1dVariant "
            "DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant F KasaLinearVariant "
            "MiCAEmbeddingVariant MiCALinearVariant MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant "
            "calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate "
            "is_alora_relevant_in_batch"
        ),
        velora="F VeloraFunction",
    ),
    "peft.tuners.lycoris_utils": "LycorisConfig LycorisLayer LycorisTuner",
    **method("miss", "MissConfig MissLayer MissLinear MissModel"),
    "peft.tuners.mixed": "COMPATIBLE_TUNER_TYPES MixedModel",
    "peft.tuners.mixed.model": (
        "COMPATIBLE_TUNER_TYPES MixedModel PREFIXES TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    ),
    "peft.tuners.multitask_prompt_tuning": (
        "MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit"
    ),
    "peft.tuners.multitask_prompt_tuning.config": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "peft.tuners.multitask_prompt_tuning.model": "MultitaskPromptEmbedding",
    **method(
        "oft",
        "Conv2d Embedding Linear OFTConfig OFTLayer OFTModel",
        layer="F MultiplicativeDropoutLayer OFTRotationModule",
    ),
    **method(
        "osf",
        "Linear OSFConfig OSFLayer OSFModel",
        layer="F dispatch_default",
        utils="decompose_weight_matrix project_gradient_to_orthogonal_space",
    ),
    "peft.tuners.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "peft.tuners.p_tuning.config": "PromptEncoderConfig PromptEncoderReparameterizationType",
    "peft.tuners.p_tuning.model": "PromptEncoder",
    **method("peanut", "Linear PeanutConfig PeanutLayer PeanutModel", config="ACT2FN", layer="ACT2FN"),
    **method("poly", "Linear PolyConfig PolyLayer PolyModel", layer="", router="ABC EPS PolyRouter Router get_router"),
    "peft.tuners.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "peft.tuners.prefix_tuning.config": "PrefixTuningConfig",
    "peft.tuners.prefix_tuning.model": "PrefixEncoder",
    "peft.tuners.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "peft.tuners.prompt_tuning.config": "PromptTuningConfig PromptTuningInit",
    "peft.tuners.prompt_tuning.model": "PromptEmbedding",
    **method("psoft", "Linear PsoftConfig PsoftLayer PsoftModel", layer="OrthLayer dispatch_default"),
    **method("pvera", "Linear PveraConfig PveraLayer PveraModel", bnb="F Linear4bit Linear8bitLt"),
    **method(
        "randlora",
        "Linear Linear4bit Linear8bitLt RandLoraConfig RandLoraLayer RandLoraModel",
        bnb="Linear4bit Linear8bitLt",
        layer="F UniqueBaseGrad",
    ),
    **method(
        "road",
        "Linear Linear4bit Linear8bitLt RoadConfig RoadLayer RoadModel",
        bnb="Linear4bit Linear8bitLt dispatch_bnb_4bit dispatch_bnb_8bit",
        layer="dispatch_default",
    ),
    "peft.tuners.shadow": "DetachedShadowModel ShadowCache ShadowCarrier ShadowConfig ShadowLayer ShadowModel",
    "peft.tuners.shadow.config": "ShadowConfig",
    "peft.tuners.shadow.diffusion_models": (
        "DetachedFluxShadowModel DiffusionShadowBackend Flux2ShadowBackend freeze_flux_stem_embeddings "
        "get_diffusion_shadow_backend validate_pretrained_flux_shadow"
    ),
    "peft.tuners.shadow.layers": "DetachedShadowModel ShadowCache ShadowCarrier ShadowLayer",
    "peft.tuners.shadow.model": "F ShadowModel",
    **method("shira", "Linear ShiraConfig ShiraLayer ShiraModel", mask_functions="random_mask"),
    **method("supertuning", "Linear SupertuningConfig SupertuningLayer SupertuningModel", layer=""),
    **method("tinylora", "Embedding Linear TinyLoraConfig TinyLoraLayer TinyLoraModel"),
    "peft.tuners.trainable_tokens": "TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
    "peft.tuners.trainable_tokens.config": "TrainableTokensConfig",
    "peft.tuners.trainable_tokens.layer": "F TrainableTokensLayer",
    "peft.tuners.trainable_tokens.model": "TrainableTokensModel",
    "peft.tuners.tuners_utils": (
        "ABC BasePromptEncoder BaseTuner BaseTunerLayer DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES "
        "EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION "
        "PEFT_TYPE_TO_PREFIX_MAPPING SEQ_CLS_HEAD_NAMES UPCAST_DTYPES _ExcludedModule "
        "_filter_state_dict_by_key_prefixes _find_minimal_target_modules _get_tuner_state_dict_key_prefixes "
        "_maybe_include_all_linear_layers cast_adapter_dtype check_adapters_to_merge check_target_module_exists "
        "clone_module delete_adapter find_parameter_name_by_module get_device_map inspect_matched_modules "
        "onload_layer replicate_layers set_adapter set_requires_grad"
    ),
    **method("unilora", "Linear UniLoraConfig UniLoraLayer UniLoraModel"),
    **method("vblora", "Linear VBLoRAConfig VBLoRALayer VBLoRAModel"),
    **method("vera", "Linear VeraConfig VeraLayer VeraModel"),
    **method(
        "waveft",
        "WaveFTConfig WaveFTLayer WaveFTLinear WaveFTModel",
        config="WAVELET_REDUCTIONS",
        constants="WAVELET_REDUCTIONS",
        layer="F WAVELET_REDUCTIONS",
        wavelet="Wavelet wavelist",
        waverec2d="Wavelet WaveletDetailTuple2d WaveletTensorTuple waverec2d",
    ),
    "peft.tuners.xlora": "XLoraConfig XLoraModel",
    "peft.tuners.xlora.classifier": "TemperatureScaledSoftmax XLoraClassifier",
    "peft.tuners.xlora.config": "XLoraConfig",
    "peft.tuners.xlora.layer": "XLoraConv2dLayer XLoraEmbeddingLayer XLoraLayer XLoraLinearLayer",
    "peft.tuners.xlora.model": "DUMMY_TARGET_MODULES XLoraModel convert_layers_to_xlora",
    "peft.utils": (
        f"{TARGETS} {CONSTANTS} {UTILS} ALLOWED_COMPUTE_DTYPES NoMatchingPeftModuleError PeftError PeftType "
        "PeftWarning TaskType UPCAST_DTYPES get_base_model_state_dict get_peft_model_state_dict "
        "get_quantization_kwargs load_peft_weights map_cache_to_layer_device_map quantization_extra_repr "
        "register_peft_method replace_lora_weights_loftq resolve_quantization_backend set_base_model_state_dict "
        "set_peft_model_state_dict"
    ),
    "peft.utils.constants": (
        f"{TARGETS} {CONSTANTS} ALLOWED_COMPUTE_DTYPES DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES "
        "MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME "
        "TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING "
        "UPCAST_DTYPES starcoder_model_postprocess_past_key_value"
    ),
    "peft.utils.error": "NoMatchingPeftModuleError PeftError",
    "peft.utils.hotswap": (
        "CONFIG_KEYS_TO_CHECK PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
        "prepare_model_for_compiled_hotswap"
    ),
    "peft.utils.incremental_pca": "IncrementalPCA",
    "peft.utils.integrations": (
        "TpInfo check_deepspeed_zero3_enabled dequantize_bnb_weight dequantize_module_weight dtensor_from_local_like "
        "gather_params_ctx get_bnb_param_type get_layer_device_map init_empty_weights map_cache_to_layer_device_map "
        "skip_init_on_device"
    ),
    "peft.utils.loftq_utils": "loftq_init replace_lora_weights_loftq",
    "peft.utils.merge_utils": (
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune "
        "prune random_pruning reshape_weight_task_tensors task_arithmetic ties"
    ),
    "peft.utils.other": (
        f"{TARGETS} {CONSTANTS} {UTILS} EMBEDDING_LAYER_NAMES _get_module_names_tied_with_embedding "
        "_get_no_split_modules fsdp_auto_wrap_policy starcoder_model_postprocess_past_key_value"
    ),
    "peft.utils.peft_types": "PeftType TaskType register_peft_method",
    "peft.utils.quantization_utils": (
        "ABC Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend QuantizationBackend "
        "TorchaoBackend get_quantization_kwargs quantization_extra_repr resolve_quantization_backend"
    ),
    "peft.utils.save_and_load": (
        "EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND PEFT_TYPE_TO_TUNER_MAPPING SAFETENSORS_WEIGHTS_NAME "
        "WEIGHTS_NAME get_base_model_state_dict get_embedding_layer_name get_peft_model_state_dict "
        "has_valid_embedding_base_layer load_peft_weights set_base_model_state_dict set_peft_model_state_dict "
        "torch_load"
    ),
    "peft.utils.transformers_weight_conversion": (
        "FlattenDims INCLUDE_LINEAR_LAYERS_SHORTHAND PeftConcatenate PermuteDims _block_diag_3d "
        "_convert_peft_config_moe build_peft_weight_mapping convert_peft_adapter_state_dict_for_transformers "
        "convert_peft_config_for_transformers get_model_conversion_mapping"
    ),
    "peft.utils.warning": "PeftWarning",
}

#: what modules of PEFT have from elsewhere, where its users replace it, and where inlay looks it up
LOOKED_UP: dict[str, dict[str, str]] = {
    "peft.config": {"__version__": "config.FORMAT_VERSION", "hf_hub_download": "integrations.hub.hf_hub_download"},
    "peft.peft_model": {"hf_hub_download": "integrations.hub.hf_hub_download"},
    "peft.utils.save_and_load": {"hf_hub_download": "integrations.hub.hf_hub_download"},
}
