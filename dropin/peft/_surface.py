"""The public names of PEFT 0.21.2 by module, and what others are known to use beside them: names, nothing else."""

from __future__ import annotations

SURFACE: dict[str, str] = {
    "peft": (
        "AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig "
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig "
        "C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig "
        "DeloraModel EvaConfig FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel "
        "GraloraConfig GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig "
        "LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig "
        "LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig MissModel "
        "MontecloraConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit NoMatchingPeftModuleError "
        "OFTConfig OFTModel OSFConfig OSFModel PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig PeanutModel PeftConfig PeftError PeftMixedModel PeftModel "
        "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
        "PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PeftWarning PolyConfig "
        "PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig "
        "PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig "
        "PsoftModel PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig "
        "ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType TinyLoraConfig TinyLoraModel "
        "TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel "
        "VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel "
        "bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters "
        "convert_to_lora create_arrow_model find_kappa_target_modules get_base_model_state_dict get_eva_state_dict "
        "get_layer_status get_model_status get_peft_config get_peft_model get_peft_model_state_dict "
        "initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text initialize_lora_eva_weights "
        "inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training preprocess_loraga "
        "prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora set_base_model_state_dict "
        "set_peft_model_state_dict shift_tokens_right"
    ),
    "peft.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification MODEL_TYPE_TO_PEFT_MODEL_MAPPING TOKENIZER_CONFIG_NAME "
        "check_import_allowlist get_default_import_allowlist"
    ),
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
        "DUMMY_MODEL_CONFIG PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
        "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification "
        "SAFETENSORS_WEIGHTS_NAME TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TunerLayerStatus "
        "TunerModelStatus WEIGHTS_NAME get_layer_status get_model_status"
    ),
    "peft.tuners": (
        "AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig "
        "BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding "
        "CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig "
        "FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HRAConfig HRAModel "
        "HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel "
        "LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig "
        "MissConfig MissModel MixedModel MontecloraConfig MultitaskPromptEmbedding MultitaskPromptTuningConfig "
        "MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig OSFModel PeanutConfig PeanutModel PolyConfig "
        "PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig "
        "PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel "
        "PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel "
        "ShiraConfig ShiraModel SupertuningConfig SupertuningModel TinyLoraConfig TinyLoraModel "
        "TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel "
        "VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel convert_to_lora "
        "create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora"
    ),
    "peft.tuners._buffer_dict": "BufferDict",
    "peft.tuners.adalora": (
        "AdaLoraConfig AdaLoraLayer AdaLoraModel RankAllocator SVDConv2d SVDLinear SVDLinear4bit SVDLinear8bitLt "
        "SVDQuantLinear"
    ),
    "peft.tuners.adalora.bnb": "SVDLinear4bit SVDLinear8bitLt",
    "peft.tuners.adalora.config": "AdaLoraConfig",
    "peft.tuners.adalora.gptq": "SVDQuantLinear",
    "peft.tuners.adalora.layer": "AdaLoraLayer RankAllocator SVDConv2d SVDLinear",
    "peft.tuners.adalora.model": "AdaLoraModel TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
    "peft.tuners.adamss": "AdamssConfig AdamssLayer AdamssModel Linear",
    "peft.tuners.adamss.asa_callback": "AdamssAsaCallback",
    "peft.tuners.adamss.config": "AdamssConfig",
    "peft.tuners.adamss.layer": "AdamssLayer F Linear",
    "peft.tuners.adamss.model": "AdamssModel TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING",
    "peft.tuners.adamss.utils": "clustering_Z get_trainable_subspaces seg_locations slice_pca",
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
    "peft.tuners.beft": "BeftConfig BeftLayer BeftModel Linear",
    "peft.tuners.beft.config": "BeftConfig",
    "peft.tuners.beft.layer": "BeftLayer Linear",
    "peft.tuners.beft.model": "BeftModel TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING",
    "peft.tuners.boft": "BOFTConfig BOFTLayer BOFTModel",
    "peft.tuners.boft.config": "BOFTConfig",
    "peft.tuners.boft.fbd": "",
    "peft.tuners.boft.layer": (
        "BOFTLayer Conv2d F FastBlockDiag Linear MultiplicativeDropoutLayer get_fbd_cuda patch_environment"
    ),
    "peft.tuners.boft.model": "BOFTModel TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING",
    "peft.tuners.c3a": "C3AConfig C3ALayer C3ALinear C3AModel",
    "peft.tuners.c3a.config": "C3AConfig",
    "peft.tuners.c3a.layer": "C3ALayer C3ALinear",
    "peft.tuners.c3a.model": "C3AModel TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING",
    "peft.tuners.c3a.utils": "BlockCircularConvolution get_circulant_fast",
    "peft.tuners.cartridge": "CartridgeConfig CartridgeEncoder",
    "peft.tuners.cartridge.config": "CartridgeConfig",
    "peft.tuners.cartridge.model": "CartridgeEncoder",
    "peft.tuners.cartridge.utils": (
        "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME compose_cartridge_adapters "
        "initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
        "prompt_embeddings_from_past_key_values"
    ),
    "peft.tuners.cpt": "CPTConfig CPTEmbedding",
    "peft.tuners.cpt.config": "CPTConfig",
    "peft.tuners.cpt.model": "CPTEmbedding",
    "peft.tuners.deft": "DeftConfig DeftLayer DeftLinear DeftModel",
    "peft.tuners.deft.config": "DeftConfig",
    "peft.tuners.deft.layer": "DeftLayer DeftLinear F",
    "peft.tuners.deft.model": "DeftModel TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING",
    "peft.tuners.delora": "DeloraConfig DeloraLayer DeloraLinear DeloraModel",
    "peft.tuners.delora.config": "DeloraConfig",
    "peft.tuners.delora.layer": "DeloraLayer DeloraLinear",
    "peft.tuners.delora.model": "DeloraModel TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING",
    "peft.tuners.fourierft": "FourierFTConfig FourierFTLayer FourierFTLinear FourierFTModel",
    "peft.tuners.fourierft.config": "FourierFTConfig",
    "peft.tuners.fourierft.layer": "F FourierFTLayer FourierFTLinear",
    "peft.tuners.fourierft.model": "FourierFTModel TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING",
    "peft.tuners.frod": "FrodConfig FrodLayer FrodModel Linear",
    "peft.tuners.frod.config": "FrodConfig",
    "peft.tuners.frod.layer": "F FrodLayer Linear",
    "peft.tuners.frod.model": "FrodModel TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING",
    "peft.tuners.glora": "GloraConfig GloraLayer GloraLinear GloraModel",
    "peft.tuners.glora.config": "GloraConfig",
    "peft.tuners.glora.layer": (
        "F GloraEmptyPath GloraLayer GloraLinear GloraLoraPath GloraPath GloraScalarPath GloraVectorPath"
    ),
    "peft.tuners.glora.model": "GloraModel TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING",
    "peft.tuners.gralora": "GraloraConfig GraloraLayer GraloraModel",
    "peft.tuners.gralora.config": "GraloraConfig",
    "peft.tuners.gralora.layer": "GraloraLayer Linear",
    "peft.tuners.gralora.model": "GraloraModel TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING",
    "peft.tuners.hira": "Conv2d Conv3d Embedding HiraConfig HiraLayer HiraModel Linear Linear4bit Linear8bitLt",
    "peft.tuners.hira.bnb": "F Linear4bit Linear8bitLt dispatch_bnb_4bit dispatch_bnb_8bit",
    "peft.tuners.hira.config": "HiraConfig",
    "peft.tuners.hira.layer": "Conv1d Conv2d Conv3d Embedding F HiraLayer Linear dispatch_default",
    "peft.tuners.hira.model": "HiraModel TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING",
    "peft.tuners.hra": "HRAConfig HRAConv2d HRALayer HRALinear HRAModel",
    "peft.tuners.hra.config": "HRAConfig",
    "peft.tuners.hra.layer": "F HRAConv2d HRALayer HRALinear",
    "peft.tuners.hra.model": "HRAModel TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING",
    "peft.tuners.ia3": "Conv2d Conv3d IA3Config IA3Layer IA3Model Linear Linear4bit Linear8bitLt",
    "peft.tuners.ia3.bnb": "Linear4bit Linear8bitLt",
    "peft.tuners.ia3.config": "IA3Config",
    "peft.tuners.ia3.layer": "Conv2d Conv3d IA3Layer Linear",
    "peft.tuners.ia3.model": (
        "IA3Model TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"
    ),
    "peft.tuners.lily": "LilyConfig LilyLayer LilyModel Linear",
    "peft.tuners.lily.config": "LilyConfig",
    "peft.tuners.lily.layer": "F LilyLayer Linear",
    "peft.tuners.lily.model": "LilyModel TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING",
    "peft.tuners.ln_tuning": "LNTuningConfig LNTuningModel",
    "peft.tuners.ln_tuning.config": "LNTuningConfig",
    "peft.tuners.ln_tuning.layer": "LNTuningLayer",
    "peft.tuners.ln_tuning.model": "LNTuningModel TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING",
    "peft.tuners.loha": "Conv2d Linear LoHaConfig LoHaLayer LoHaModel",
    "peft.tuners.loha.config": "LoHaConfig",
    "peft.tuners.loha.layer": "Conv1d Conv2d F HadaWeight HadaWeightCP Linear LoHaLayer make_weight make_weight_cp",
    "peft.tuners.loha.model": "LoHaModel TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING",
    "peft.tuners.lokr": "Conv2d Linear LoKrConfig LoKrLayer LoKrModel",
    "peft.tuners.lokr.config": "LoKrConfig",
    "peft.tuners.lokr.layer": "Conv1d Conv2d F Linear LoKrLayer factorization make_kron make_weight_cp",
    "peft.tuners.lokr.model": "LoKrModel TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING",
    "peft.tuners.lora": (
        "ArrowConfig BdLoraConfig Conv2d Conv3d Embedding EvaConfig GPTQLoraLinear KasaConfig Linear Linear4bit "
        "Linear8bitLt LoftQConfig LoraConfig LoraGAConfig LoraLayer LoraModel LoraRuntimeConfig MontecloraConfig "
        "ParamWrapper VeloraConfig "
        "convert_to_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga "
        "save_as_lora"
    ),
    "peft.tuners.lora.aqlm": "AqlmLoraLinear dispatch_aqlm",
    "peft.tuners.lora.arrow": (
        "ArrowLoraLinearLayer GKS_ADAPTER_PREFIX TASK_ADAPTER_PREFIX check_loaded_lora_compatibility_arrow "
        "create_arrow_model ensure_adapters_target_linear_layers_only"
    ),
    "peft.tuners.lora.awq": "AwqLoraLinear dispatch_awq",
    "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt VARIANT_KWARG_KEYS dispatch_bnb_4bit dispatch_bnb_8bit",
    "peft.tuners.lora.config": (
        "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig "
        "LoraRuntimeConfig MontecloraConfig VeloraConfig"
    ),
    "peft.tuners.lora.conversion": "SAFETENSORS_WEIGHTS_NAME convert_to_lora save_as_lora",
    "peft.tuners.lora.corda": "CordaConfig preprocess_corda",
    "peft.tuners.lora.dora": (
        "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer ENABLE_DORA_CACHING F "
        "cache_decorator dequantize_module_weight"
    ),
    "peft.tuners.lora.eetq": "dispatch_eetq",
    "peft.tuners.lora.eva": (
        "HashHook MIN_TARGET_MODULES_FOR_OPTIMIZATION SVDHook UNSUPPORTED_LORA_MODULES find_equal_values "
        "forward_fn_dict get_device_with_meta_params get_eva_state_dict initialize_lora_eva_weights "
        "move_inputs_to_device prepare_layer_inputs_fn_language_modeling prepare_model_inputs_fn_language_modeling"
    ),
    "peft.tuners.lora.gptq": "GPTQLoraLinear dispatch_gptq",
    "peft.tuners.lora.hqq": "dispatch_hqq",
    "peft.tuners.lora.inc": "dispatch_inc",
    "peft.tuners.lora.intruders": "reduce_intruder_dimension",
    "peft.tuners.lora.layer": (
        "ALLOWED_COMPUTE_DTYPES Conv1d Conv2d Conv3d Embedding F Linear LoraEmbeddingATPHolder LoraLayer "
        "LoraVariant MultiheadAttention ParamWrapper UPCAST_DTYPES VARIANT_KWARG_KEYS _LoraParameterProxy "
        "check_adapters_to_merge dispatch_default transpose"
    ),
    "peft.tuners.lora.loraga": "estimate_gradients get_model_device get_target_modules preprocess_loraga",
    "peft.tuners.lora.model": (
        "LoraModel TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING add_lora_tp_hooks_dtensor get_tp_plan_and_mesh"
    ),
    "peft.tuners.lora.monteclora": "BufferedMontecloraSampler MontecloraSampler",
    "peft.tuners.lora.te": "TeLinear dispatch_transformer_engine",
    "peft.tuners.lora.torchao": "TorchaoLoraLinear dispatch_torchao",
    "peft.tuners.lora.tp_layer": "LoraParallelLinear dispatch_megatron get_default_module_allowlist",
    "peft.tuners.lora.variants": (
        "ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant BlockDiagonalLinear DoraConv1dVariant "
        "DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant F KasaLinearVariant "
        "MiCAEmbeddingVariant MiCALinearVariant MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant "
        "calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate "
        "is_alora_relevant_in_batch"
    ),
    "peft.tuners.lora.velora": "F VeloraFunction",
    "peft.tuners.lycoris_utils": "LycorisConfig LycorisLayer LycorisTuner",
    "peft.tuners.miss": "MissConfig MissLayer MissLinear MissModel",
    "peft.tuners.miss.config": "MissConfig",
    "peft.tuners.miss.layer": "F MissLayer MissLinear",
    "peft.tuners.miss.model": "MissModel TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING",
    "peft.tuners.mixed": "COMPATIBLE_TUNER_TYPES MixedModel",
    "peft.tuners.mixed.model": (
        "COMPATIBLE_TUNER_TYPES MixedModel PREFIXES TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    ),
    "peft.tuners.multitask_prompt_tuning": (
        "MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit"
    ),
    "peft.tuners.multitask_prompt_tuning.config": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "peft.tuners.multitask_prompt_tuning.model": "MultitaskPromptEmbedding",
    "peft.tuners.oft": "Conv2d Embedding Linear OFTConfig OFTLayer OFTModel",
    "peft.tuners.oft.config": "OFTConfig",
    "peft.tuners.oft.layer": "Conv2d Embedding F Linear MultiplicativeDropoutLayer OFTLayer OFTRotationModule",
    "peft.tuners.oft.model": "OFTModel TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING",
    "peft.tuners.osf": "Linear OSFConfig OSFLayer OSFModel",
    "peft.tuners.osf.config": "OSFConfig",
    "peft.tuners.osf.layer": "F Linear OSFLayer dispatch_default",
    "peft.tuners.osf.model": "OSFModel TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING",
    "peft.tuners.osf.utils": "decompose_weight_matrix project_gradient_to_orthogonal_space",
    "peft.tuners.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "peft.tuners.p_tuning.config": "PromptEncoderConfig PromptEncoderReparameterizationType",
    "peft.tuners.p_tuning.model": "PromptEncoder",
    "peft.tuners.peanut": "Linear PeanutConfig PeanutLayer PeanutModel",
    "peft.tuners.peanut.config": "ACT2FN PeanutConfig",
    "peft.tuners.peanut.layer": "ACT2FN Linear PeanutLayer",
    "peft.tuners.peanut.model": "PeanutModel TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING",
    "peft.tuners.poly": "Linear PolyConfig PolyLayer PolyModel",
    "peft.tuners.poly.config": "PolyConfig",
    "peft.tuners.poly.layer": "Linear PolyLayer",
    "peft.tuners.poly.model": "PolyModel TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING",
    "peft.tuners.poly.router": "ABC EPS PolyRouter Router get_router",
    "peft.tuners.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "peft.tuners.prefix_tuning.config": "PrefixTuningConfig",
    "peft.tuners.prefix_tuning.model": "PrefixEncoder",
    "peft.tuners.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "peft.tuners.prompt_tuning.config": "PromptTuningConfig PromptTuningInit",
    "peft.tuners.prompt_tuning.model": "PromptEmbedding",
    "peft.tuners.psoft": "Linear PsoftConfig PsoftLayer PsoftModel",
    "peft.tuners.psoft.config": "PsoftConfig",
    "peft.tuners.psoft.layer": "Linear OrthLayer PsoftLayer dispatch_default",
    "peft.tuners.psoft.model": "PsoftModel TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING",
    "peft.tuners.pvera": "Linear PveraConfig PveraLayer PveraModel",
    "peft.tuners.pvera.bnb": "F Linear4bit Linear8bitLt",
    "peft.tuners.pvera.config": "PveraConfig",
    "peft.tuners.pvera.layer": "F Linear PveraLayer",
    "peft.tuners.pvera.model": "PveraModel TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING",
    "peft.tuners.randlora": "Linear Linear4bit Linear8bitLt RandLoraConfig RandLoraLayer RandLoraModel",
    "peft.tuners.randlora.bnb": "Linear4bit Linear8bitLt",
    "peft.tuners.randlora.config": "RandLoraConfig",
    "peft.tuners.randlora.layer": "F Linear RandLoraLayer UniqueBaseGrad",
    "peft.tuners.randlora.model": "RandLoraModel TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING",
    "peft.tuners.road": "Linear Linear4bit Linear8bitLt RoadConfig RoadLayer RoadModel",
    "peft.tuners.road.bnb": "Linear4bit Linear8bitLt dispatch_bnb_4bit dispatch_bnb_8bit",
    "peft.tuners.road.config": "RoadConfig",
    "peft.tuners.road.layer": "Linear RoadLayer dispatch_default",
    "peft.tuners.road.model": "RoadModel TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING",
    "peft.tuners.shadow": "DetachedShadowModel ShadowCache ShadowCarrier ShadowConfig ShadowLayer ShadowModel",
    "peft.tuners.shadow.config": "ShadowConfig",
    "peft.tuners.shadow.diffusion_models": (
        "DetachedFluxShadowModel DiffusionShadowBackend Flux2ShadowBackend freeze_flux_stem_embeddings "
        "get_diffusion_shadow_backend validate_pretrained_flux_shadow"
    ),
    "peft.tuners.shadow.layers": "DetachedShadowModel ShadowCache ShadowCarrier ShadowLayer",
    "peft.tuners.shadow.model": "F ShadowModel",
    "peft.tuners.shira": "Linear ShiraConfig ShiraLayer ShiraModel",
    "peft.tuners.shira.config": "ShiraConfig",
    "peft.tuners.shira.layer": "F Linear ShiraLayer",
    "peft.tuners.shira.mask_functions": "random_mask",
    "peft.tuners.shira.model": "ShiraModel TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING",
    "peft.tuners.supertuning": "Linear SupertuningConfig SupertuningLayer SupertuningModel",
    "peft.tuners.supertuning.config": "SupertuningConfig",
    "peft.tuners.supertuning.layer": "Linear SupertuningLayer",
    "peft.tuners.supertuning.model": "SupertuningModel TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING",
    "peft.tuners.tinylora": "Embedding Linear TinyLoraConfig TinyLoraLayer TinyLoraModel",
    "peft.tuners.tinylora.config": "TinyLoraConfig",
    "peft.tuners.tinylora.layer": "Embedding F Linear TinyLoraLayer",
    "peft.tuners.tinylora.model": "TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING TinyLoraModel",
    "peft.tuners.trainable_tokens": "TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
    "peft.tuners.trainable_tokens.config": "TrainableTokensConfig",
    "peft.tuners.trainable_tokens.layer": "F TrainableTokensLayer",
    "peft.tuners.trainable_tokens.model": "TrainableTokensModel",
    "peft.tuners.tuners_utils": (
        "ABC BasePromptEncoder BaseTuner BaseTunerLayer DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES "
        "INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION PEFT_TYPE_TO_PREFIX_MAPPING "
        "SEQ_CLS_HEAD_NAMES UPCAST_DTYPES _ExcludedModule _filter_state_dict_by_key_prefixes "
        "_find_minimal_target_modules _get_tuner_state_dict_key_prefixes _maybe_include_all_linear_layers "
        "cast_adapter_dtype "
        "check_adapters_to_merge check_target_module_exists clone_module delete_adapter "
        "find_parameter_name_by_module get_device_map inspect_matched_modules onload_layer replicate_layers "
        "set_adapter set_requires_grad"
    ),
    "peft.tuners.unilora": "Linear UniLoraConfig UniLoraLayer UniLoraModel",
    "peft.tuners.unilora.config": "UniLoraConfig",
    "peft.tuners.unilora.layer": "F Linear UniLoraLayer",
    "peft.tuners.unilora.model": "TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING UniLoraModel",
    "peft.tuners.vblora": "Linear VBLoRAConfig VBLoRALayer VBLoRAModel",
    "peft.tuners.vblora.config": "VBLoRAConfig",
    "peft.tuners.vblora.layer": "F Linear VBLoRALayer",
    "peft.tuners.vblora.model": "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING VBLoRAModel",
    "peft.tuners.vera": "Linear VeraConfig VeraLayer VeraModel",
    "peft.tuners.vera.config": "VeraConfig",
    "peft.tuners.vera.layer": "F Linear VeraLayer",
    "peft.tuners.vera.model": "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING VeraModel",
    "peft.tuners.waveft": "WaveFTConfig WaveFTLayer WaveFTLinear WaveFTModel",
    "peft.tuners.waveft.config": "WAVELET_REDUCTIONS WaveFTConfig",
    "peft.tuners.waveft.constants": "WAVELET_REDUCTIONS",
    "peft.tuners.waveft.layer": "F WAVELET_REDUCTIONS WaveFTLayer WaveFTLinear",
    "peft.tuners.waveft.model": "TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING WaveFTModel",
    "peft.tuners.waveft.wavelet": "Wavelet wavelist",
    "peft.tuners.waveft.waverec2d": "Wavelet WaveletDetailTuple2d WaveletTensorTuple waverec2d",
    "peft.tuners.xlora": "XLoraConfig XLoraModel",
    "peft.tuners.xlora.classifier": "TemperatureScaledSoftmax XLoraClassifier",
    "peft.tuners.xlora.config": "XLoraConfig",
    "peft.tuners.xlora.layer": "XLoraConv2dLayer XLoraEmbeddingLayer XLoraLayer XLoraLinearLayer",
    "peft.tuners.xlora.model": "DUMMY_TARGET_MODULES XLoraModel convert_layers_to_xlora",
    "peft.utils": (
        "ALLOWED_COMPUTE_DTYPES AuxiliaryTrainingWrapper CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND "
        "ModulesToSaveWrapper NoMatchingPeftModuleError PeftError PeftType PeftWarning SAFETENSORS_WEIGHTS_NAME "
        "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
        "TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING TaskType TrainableTokensWrapper UPCAST_DTYPES "
        "WEIGHTS_NAME _freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match "
        "_prepare_prompt_learning_config _set_adapter _set_trainable bloom_model_postprocess_past_key_value "
        "cast_mixed_precision_params get_base_model_state_dict get_gptqmodel_quant_linear get_pattern_key "
        "get_peft_model_state_dict get_quantization_config get_quantization_kwargs id_tensor_storage infer_device "
        "load_peft_weights map_cache_to_layer_device_map prepare_model_for_kbit_training quantization_extra_repr "
        "register_peft_method replace_lora_weights_loftq resolve_quantization_backend "
        "set_additional_trainable_modules set_base_model_state_dict set_peft_model_state_dict shift_tokens_right "
        "transpose"
    ),
    "peft.utils.constants": (
        "ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES "
        "INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME "
        "SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
        "TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING UPCAST_DTYPES WEIGHTS_NAME "
        "bloom_model_postprocess_past_key_value starcoder_model_postprocess_past_key_value"
    ),
    "peft.utils.error": "NoMatchingPeftModuleError PeftError",
    "peft.utils.hotswap": (
        "CONFIG_KEYS_TO_CHECK PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
        "prepare_model_for_compiled_hotswap"
    ),
    "peft.utils.incremental_pca": "IncrementalPCA",
    "peft.utils.integrations": (
        "TpInfo check_deepspeed_zero3_enabled dequantize_bnb_weight dequantize_module_weight "
        "dtensor_from_local_like gather_params_ctx get_bnb_param_type get_layer_device_map init_empty_weights "
        "map_cache_to_layer_device_map skip_init_on_device"
    ),
    "peft.utils.loftq_utils": "loftq_init replace_lora_weights_loftq",
    "peft.utils.merge_utils": (
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune "
        "prune random_pruning reshape_weight_task_tensors task_arithmetic ties"
    ),
    "peft.utils.other": (
        "AuxiliaryTrainingWrapper CONFIG_NAME EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
        "ModulesToSaveWrapper SAFETENSORS_WEIGHTS_NAME TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
        "TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING TrainableTokensWrapper WEIGHTS_NAME _freeze_adapter "
        "_get_batch_size _get_input_embeddings_name _get_module_names_tied_with_embedding _get_no_split_modules "
        "_get_submodules _is_valid_match "
        "_prepare_prompt_learning_config _set_adapter _set_trainable bloom_model_postprocess_past_key_value "
        "cast_mixed_precision_params fsdp_auto_wrap_policy get_gptqmodel_quant_linear get_pattern_key "
        "get_quantization_config id_tensor_storage infer_device prepare_model_for_kbit_training "
        "set_additional_trainable_modules shift_tokens_right starcoder_model_postprocess_past_key_value transpose"
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
