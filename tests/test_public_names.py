"""What `from inlay import ...` offers is written down here too, so that no name comes or goes by accident."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import inlay

TREE = Path(__file__).parents[1]

PUBLIC_NAMES = [
    "__version__",
    # configs
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraRuntimeConfig",
    "OFTConfig",
    "LoftQConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "get_peft_config",
    "invocation_tokens",
    "register_peft_method",
    # the handle
    "get_peft_model",
    "PeftMixedModel",
    "PeftModel",
    "Session",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    # another adapter under a compiled model
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_model",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
    # models that stay the user's own
    "AdapterMixin",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
    # prompts
    "PromptLearningConfig",
    "CartridgeConfig",
    "CartridgeEncoder",
    "CPTConfig",
    "CPTEmbedding",
    "compose_cartridge_adapters",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptTuningConfig",
    "PromptTuningInit",
    # what is there, what would be, what went wrong
    "Explanation",
    "explain",
    "LoadReport",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftWarning",
]


def test_all_is_the_list() -> None:
    assert sorted(inlay.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_name_resolves_and_is_listed(name: str) -> None:
    assert not isinstance(getattr(inlay, name), ModuleType)
    assert name in dir(inlay)


def test_no_module_hides_a_name() -> None:
    # Python sets a module as an attribute of its package once anyone has imported it, over what is lazily resolved.
    namesakes = [name for name in PUBLIC_NAMES if (TREE / "src/inlay" / f"{name}.py").is_file()]
    code = f"import inlay\nfor n in {namesakes}: __import__('inlay.' + n); print(type(getattr(inlay, n)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE / "src", capture_output=True, text=True, check=True)
    assert "module" not in done.stdout, f"{namesakes}: {done.stdout}"


def test_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="LoraConfg"):
        inlay.LoraConfg  # noqa: B018


def test_version_is_the_distributions() -> None:
    pyproject = tomllib.loads((TREE / "pyproject.toml").read_text())
    assert inlay.__version__ == pyproject["project"]["version"]
