"""inlay adapts large pretrained PyTorch models by training a few parameters set into them while the rest stays frozen.

It speaks the PEFT library's language: names, config fields, files on disk, live parameter names. Names are resolved on
first use, so that importing the package costs what importing torch costs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME = {
    "invocation_tokens": "activation",
    "AutoPeftModel": "auto",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "PeftConfig": "config",
    "PeftType": "config",
    "TaskType": "config",
    "PeftError": "errors",
    "PeftWarning": "errors",
    "NoMatchingPeftModuleError": "errors",
    "Explanation": "explanation",
    "explain": "explanation",
    "check_hotswap_configs_compatible": "hotswap",
    "hotswap_adapter": "hotswap",
    "hotswap_adapter_from_model": "hotswap",
    "hotswap_adapter_from_state_dict": "hotswap",
    "prepare_model_for_compiled_hotswap": "hotswap",
    "LoftQConfig": "inits",
    "register_peft_method": "methods",
    "AdaLoraConfig": "methods.adalora",
    "AdaptionPromptConfig": "methods.adaption_prompt",
    "IA3Config": "methods.ia3",
    "LoHaConfig": "methods.loha",
    "LoKrConfig": "methods.lokr",
    "LoraConfig": "methods.lora",
    "LoraRuntimeConfig": "methods._low_rank",
    "OFTConfig": "methods.oft",
    "AdapterMixin": "mixin",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "model",
    "PeftMixedModel": "model",
    "PeftModel": "model",
    "PeftModelForCausalLM": "model",
    "PeftModelForFeatureExtraction": "model",
    "PeftModelForQuestionAnswering": "model",
    "PeftModelForSeq2SeqLM": "model",
    "PeftModelForSequenceClassification": "model",
    "PeftModelForTokenClassification": "model",
    "get_peft_config": "model",
    "get_peft_model": "model",
    "inject_adapter_in_model": "model",
    "prepare_model_for_kbit_training": "prepare",
    "PromptLearningConfig": "prompts._abstract",
    "CartridgeConfig": "prompts.cartridge",
    "CartridgeEncoder": "prompts.cartridge",
    "CPTConfig": "prompts.cpt",
    "CPTEmbedding": "prompts.cpt",
    "compose_cartridge_adapters": "prompts.kv_prefix",
    "initialize_kv_prefix_from_past_key_values": "prompts.kv_prefix",
    "initialize_kv_prefix_from_text": "prompts.kv_prefix",
    "prompt_embeddings_from_past_key_values": "prompts.kv_prefix",
    "MultitaskPromptEmbedding": "prompts.multitask",
    "MultitaskPromptTuningConfig": "prompts.multitask",
    "MultitaskPromptTuningInit": "prompts.multitask",
    "PromptEncoder": "prompts.p_tuning",
    "PromptEncoderConfig": "prompts.p_tuning",
    "PromptEncoderReparameterizationType": "prompts.p_tuning",
    "PrefixEncoder": "prompts.prefix_tuning",
    "PrefixTuningConfig": "prompts.prefix_tuning",
    "PromptEmbedding": "prompts.prompt_tuning",
    "PromptTuningConfig": "prompts.prompt_tuning",
    "PromptTuningInit": "prompts.prompt_tuning",
    "replace_lora_weights_loftq": "refit",
    "LoadReport": "report",
    "Session": "session",
    "get_peft_model_state_dict": "state",
    "load_peft_weights": "state",
    "set_peft_model_state_dict": "state",
    "TunerLayerStatus": "status",
    "TunerModelStatus": "status",
    "get_layer_status": "status",
    "get_model_status": "status",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"inlay.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "settings":  # a module to set one value in, not a name to import
        return importlib.import_module("inlay.settings")
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:  # the same names for type checkers; "as" makes them exported
    from inlay.activation import invocation_tokens as invocation_tokens
    from inlay.auto import AutoPeftModel as AutoPeftModel
    from inlay.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from inlay.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from inlay.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from inlay.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from inlay.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from inlay.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from inlay.config import PeftConfig as PeftConfig
    from inlay.config import PeftType as PeftType
    from inlay.config import TaskType as TaskType
    from inlay.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from inlay.errors import PeftError as PeftError
    from inlay.errors import PeftWarning as PeftWarning
    from inlay.explanation import Explanation as Explanation
    from inlay.explanation import explain as explain
    from inlay.hotswap import check_hotswap_configs_compatible as check_hotswap_configs_compatible
    from inlay.hotswap import hotswap_adapter as hotswap_adapter
    from inlay.hotswap import hotswap_adapter_from_model as hotswap_adapter_from_model
    from inlay.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
    from inlay.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from inlay.inits import LoftQConfig as LoftQConfig
    from inlay.methods import register_peft_method as register_peft_method
    from inlay.methods._low_rank import LoraRuntimeConfig as LoraRuntimeConfig
    from inlay.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from inlay.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from inlay.methods.ia3 import IA3Config as IA3Config
    from inlay.methods.loha import LoHaConfig as LoHaConfig
    from inlay.methods.lokr import LoKrConfig as LoKrConfig
    from inlay.methods.lora import LoraConfig as LoraConfig
    from inlay.methods.oft import OFTConfig as OFTConfig
    from inlay.mixin import AdapterMixin as AdapterMixin
    from inlay.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from inlay.model import PeftMixedModel as PeftMixedModel
    from inlay.model import PeftModel as PeftModel
    from inlay.model import PeftModelForCausalLM as PeftModelForCausalLM
    from inlay.model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from inlay.model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from inlay.model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from inlay.model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from inlay.model import PeftModelForTokenClassification as PeftModelForTokenClassification
    from inlay.model import get_peft_config as get_peft_config
    from inlay.model import get_peft_model as get_peft_model
    from inlay.model import inject_adapter_in_model as inject_adapter_in_model
    from inlay.prepare import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from inlay.prompts._abstract import PromptLearningConfig as PromptLearningConfig
    from inlay.prompts.cartridge import CartridgeConfig as CartridgeConfig
    from inlay.prompts.cartridge import CartridgeEncoder as CartridgeEncoder
    from inlay.prompts.cpt import CPTConfig as CPTConfig
    from inlay.prompts.cpt import CPTEmbedding as CPTEmbedding
    from inlay.prompts.kv_prefix import compose_cartridge_adapters as compose_cartridge_adapters
    from inlay.prompts.kv_prefix import (
        initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
    )
    from inlay.prompts.kv_prefix import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
    from inlay.prompts.kv_prefix import (
        prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values,
    )
    from inlay.prompts.multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from inlay.prompts.multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from inlay.prompts.multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from inlay.prompts.p_tuning import PromptEncoder as PromptEncoder
    from inlay.prompts.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from inlay.prompts.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from inlay.prompts.prefix_tuning import PrefixEncoder as PrefixEncoder
    from inlay.prompts.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from inlay.prompts.prompt_tuning import PromptEmbedding as PromptEmbedding
    from inlay.prompts.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from inlay.prompts.prompt_tuning import PromptTuningInit as PromptTuningInit
    from inlay.refit import replace_lora_weights_loftq as replace_lora_weights_loftq
    from inlay.report import LoadReport as LoadReport
    from inlay.session import Session as Session
    from inlay.state import get_peft_model_state_dict as get_peft_model_state_dict
    from inlay.state import load_peft_weights as load_peft_weights
    from inlay.state import set_peft_model_state_dict as set_peft_model_state_dict
    from inlay.status import TunerLayerStatus as TunerLayerStatus
    from inlay.status import TunerModelStatus as TunerModelStatus
    from inlay.status import get_layer_status as get_layer_status
    from inlay.status import get_model_status as get_model_status
