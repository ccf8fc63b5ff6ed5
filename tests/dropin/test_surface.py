"""Every public name of PEFT's can be imported from where it is there, and is what inlay has of it."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft._surface import SURFACE
from torch import nn

import inlay
from inlay.errors import NotBuiltError


def test_the_distribution_stands_for_the_incumbent() -> None:
    assert importlib.metadata.version("peft") == peft.__version__ == "0.21.2"
    assert importlib.metadata.metadata("peft")["Name"] == "peft"
    assert len([d for d in importlib.metadata.distributions() if d.metadata["Name"] == "peft"]) == 1


@pytest.mark.parametrize("module", sorted(SURFACE))
def test_every_name_resolves(module: str) -> None:
    found = importlib.import_module(module)
    for name in SURFACE[module].split():
        assert getattr(found, name) is getattr(found, name)


@pytest.mark.parametrize("name", sorted(set(inlay.__all__) & {n for names in SURFACE.values() for n in names.split()}))
def test_a_name_of_inlays_is_inlays_object(name: str) -> None:
    for module, names in SURFACE.items():
        if name in names.split():
            assert getattr(importlib.import_module(module), name) is getattr(inlay, name)


def test_the_same_object_is_found_by_every_path() -> None:
    from peft.tuners.lora import LoraLayer, layer
    from peft.tuners.lora.layer import LoraLayer as again
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper
    from peft.utils.other import ModulesToSaveWrapper as other

    assert LoraLayer is again is layer.LoraLayer
    assert ModulesToSaveWrapper is other
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)


def test_what_is_not_built_can_be_named_and_says_so_when_used() -> None:
    from peft import VeraConfig, VeraModel, convert_to_lora
    from peft.tuners.vera import VeraLayer
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING as targets

    assert issubclass(VeraConfig, peft.PeftConfig)
    assert not isinstance(peft.LoraConfig(), VeraConfig)
    assert not isinstance(nn.Linear(2, 2), VeraLayer)
    assert peft.PeftType.VERA == "VERA"
    assert targets == {}
    for use in (VeraModel, convert_to_lora):
        with pytest.raises(NotBuiltError, match="not in inlay yet"):
            use(r=4)


def test_a_config_that_is_not_built_can_stand_in_a_table() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    config = peft.VeraConfig(r=4, target_modules=["0"])
    assert (config.r, config.target_modules) == (4, ["0"])
    assert config == config != peft.VeraConfig(r=4, target_modules=["0"])
    assert "VeraConfig" in repr(copy.deepcopy(config))
    for use in (peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        with pytest.raises(NotBuiltError, match=r"VeraConfig is not in inlay yet"):
            use(model, config)
    assert type(model[0]) is nn.Linear


def test_an_unknown_name_is_an_error_and_an_unknown_module_too() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        peft.Nothing  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("peft.tuners.nothing")
    with pytest.raises(ImportError):
        from peft.utils import nothing  # noqa: F401


def adapted(config: peft.PeftConfig) -> tuple[nn.Module, nn.Module, peft.PeftModel]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3))
    return model[0], model, peft.get_peft_model(model, config)


#: package, config, names of classes that an adapted Linear is one of
LINEAR = [
    ("lora", peft.LoraConfig(target_modules=["0"]), ("LoraLayer", "Linear")),
    ("adalora", peft.AdaLoraConfig(target_modules=["0"], total_step=9), ("AdaLoraLayer", "SVDLinear")),
    ("ia3", peft.IA3Config(target_modules=["0"], feedforward_modules=[]), ("IA3Layer", "Linear")),
    ("loha", peft.LoHaConfig(target_modules=["0"]), ("LoHaLayer", "Linear")),
    ("lokr", peft.LoKrConfig(target_modules=["0"]), ("LoKrLayer", "Linear")),
    ("oft", peft.OFTConfig(target_modules=["0"], oft_block_size=2, r=0), ("OFTLayer", "Linear")),
]


@pytest.mark.parametrize(("package", "config", "names"), LINEAR, ids=[row[0] for row in LINEAR])
def test_isinstance_tells_the_truth_about_a_layer(package: str, config: peft.PeftConfig, names: tuple) -> None:
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    _, model, handle = adapted(config)
    for other, _, others in LINEAR:
        module = importlib.import_module(f"peft.tuners.{other}.layer")
        for name in others:
            cls = getattr(module, name)
            expected = other == package or (name == "LoraLayer" and package == "adalora")
            assert isinstance(model[0], cls) is expected
            assert issubclass(cls, BaseTunerLayer)
            assert not isinstance(model[1], cls)
    module = importlib.import_module(f"peft.tuners.{package}.layer")
    assert not isinstance(model[0], getattr(module, "Conv2d", getattr(module, "SVDConv2d", None)))
    assert isinstance(model[0], BaseTunerLayer)
    assert isinstance(handle.base_model, BaseTuner)
    tuners = {row[0]: peft.PEFT_TYPE_TO_TUNER_MAPPING[row[1].peft_type] for row in LINEAR}
    counted = {package, *(("lora",) if package == "adalora" else ())}
    assert {name for name, cls in tuners.items() if isinstance(handle.base_model, cls)} == counted


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lora", "GPTQLoraLinear"),
        ("lora.awq", "AwqLoraLinear"),
        ("lora.aqlm", "AqlmLoraLinear"),
        ("lora.torchao", "TorchaoLoraLinear"),
        ("lora.te", "TeLinear"),
        ("lora.tp_layer", "LoraParallelLinear"),
        ("adalora.gptq", "SVDQuantLinear"),
    ],
)
def test_a_layer_that_is_not_packed_is_none_of_the_packed(module: str, name: str) -> None:
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    cls = getattr(importlib.import_module(f"peft.tuners.{module}"), name)
    _, model, _ = adapted(peft.LoraConfig(target_modules=["0"]))
    assert issubclass(cls, BaseTunerLayer)
    assert isinstance(model[0], LoraLayer)
    assert isinstance(model[0], Linear)
    assert not isinstance(model[0], cls)


def test_the_bases_of_configs_encoders_and_tuners_are_told() -> None:
    from peft.config import PeftConfigMixin
    from peft.tuners.lycoris_utils import LycorisConfig, LycorisTuner
    from peft.tuners.tuners_utils import BasePromptEncoder

    assert isinstance(peft.PromptTuningConfig(num_virtual_tokens=2), PeftConfigMixin)
    for config, lycoris in (
        (peft.LoHaConfig(target_modules=["0"]), True),
        (peft.LoraConfig(target_modules=["0"]), False),
    ):
        assert isinstance(config, PeftConfigMixin)
        assert isinstance(config, LycorisConfig) is lycoris
        assert isinstance(adapted(config)[2].base_model, LycorisTuner) is lycoris
    assert issubclass(peft.PrefixEncoder, BasePromptEncoder)


#: paths to one object, which is defined at the last
PATHS = [
    ("peft.VeraConfig", "peft.tuners.vera.VeraConfig", "peft.tuners.vera.config.VeraConfig"),
    ("peft.LoraModel", "peft.tuners.lora.LoraModel", "peft.tuners.lora.model.LoraModel"),
    ("peft.tuners.MixedModel", "peft.tuners.mixed.MixedModel", "peft.tuners.mixed.model.MixedModel"),
    ("peft.convert_to_lora", "peft.tuners.lora.convert_to_lora", "peft.tuners.lora.conversion.convert_to_lora"),
    ("peft.tuners.lora.GPTQLoraLinear", "peft.tuners.lora.gptq.GPTQLoraLinear"),
    ("peft.tuners.loha.Linear", "peft.tuners.loha.layer.Linear"),
]


@pytest.mark.parametrize("paths", PATHS, ids=[row[0] for row in PATHS])
def test_one_object_by_all_paths_which_names_where_it_is_defined(paths: tuple[str, ...]) -> None:
    found = [getattr(importlib.import_module(p.rpartition(".")[0]), p.rpartition(".")[2]) for p in paths]
    assert all(one is found[0] for one in found)
    assert f"{found[0].__module__}.{found[0].__qualname__}" == paths[-1]
    assert pickle.loads(pickle.dumps(found[0])) is found[0]
    assert copy.deepcopy(found[0]) is found[0]


def test_the_same_name_of_two_methods_is_two_classes() -> None:
    from peft.tuners.loha import Linear as loha
    from peft.tuners.lora import Linear as lora
    from peft.tuners.vera import Linear as vera

    assert len({loha, lora, vera}) == 3


def test_tables_are_as_the_incumbents_are() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as feedforward

    assert feedforward["llama"] == ["down_proj"]
    assert "<PeftType.LORA: 'LORA'>: <class" in repr(peft.PEFT_TYPE_TO_CONFIG_MAPPING)
    assert peft.PeftType.LORA in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert peft.PeftType.PREFIX_TUNING in peft.PEFT_TYPE_TO_TUNER_MAPPING
    assert peft.PeftType.PREFIX_TUNING not in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_a_module_lists_what_it_has() -> None:
    assert {"tuners", "utils", "LoraConfig", "__version__"} <= set(dir(peft))
    assert {"layer", "bnb", "LoraLayer", "__name__"} <= set(dir(peft.tuners.lora))
    assert not {"tuners", "__version__"} & set(peft.__all__)


@pytest.mark.parametrize("module", sorted(SURFACE))
def test_a_star_import_gives_the_public_names(module: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {module} import *", names)
    assert set(names) - {"__builtins__"} == {name for name in SURFACE[module].split() if not name.startswith("_")}


def test_classes_know_the_slots_of_their_layers() -> None:
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lora import LoraLayer

    _, model, _ = adapted(peft.LoraConfig(target_modules=["0"]))
    assert set(model[0].adapter_layer_names) <= set(LoraLayer.adapter_layer_names)
    assert LoHaLayer.adapter_layer_names[0] == "hada_w1_a"
    assert "scaling" in model[0].other_param_names


def test_classes_stand_above_each_other_as_the_incumbents_do() -> None:
    from peft.tuners import adalora, ia3, lora

    assert issubclass(lora.Linear, lora.LoraLayer)
    assert issubclass(adalora.SVDLinear, adalora.AdaLoraLayer)
    assert issubclass(adalora.AdaLoraLayer, lora.LoraLayer)
    assert issubclass(peft.AdaLoraModel, peft.LoraModel)
    assert not issubclass(ia3.Linear, lora.LoraLayer)
    assert not issubclass(peft.IA3Model, peft.LoraModel)
    fields = peft.AdaLoraConfig(target_modules=["0"], total_step=3)
    assert isinstance(peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), fields).base_model, peft.LoraModel)


def test_a_tuners_class_makes_one() -> None:
    model = peft.LoraModel(nn.Sequential(nn.Linear(4, 4)), {"a": peft.LoraConfig(target_modules=["0"])}, "a")
    assert isinstance(model, peft.LoraModel)
    assert model(torch.ones(2, 4)).shape == (2, 4)
    assert model.model[0].active_adapters == ["a"]
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        peft.LoraModel(model.model, peft.LoraConfig(r=3, target_modules=["0"]), "a")
    assert dict(model.model[0].r) == {"a": 3}


@pytest.mark.parametrize(
    ("cls", "config", "how"),
    [
        (peft.LoraModel, peft.LoraConfig(target_modules=["0"]), "peft_config"),
        (peft.AdaLoraModel, peft.AdaLoraConfig(target_modules=["0"], total_step=9), "config"),
        (peft.IA3Model, peft.IA3Config(target_modules=["0"], feedforward_modules=[]), "peft_config"),
        (peft.OFTModel, peft.OFTConfig(target_modules=["0"], oft_block_size=2, r=0), "peft_config"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_tuners_class_takes_its_arguments_by_name(
    cls: type, config: peft.PeftConfig, how: str, listed: bool
) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    given = {how: {"a": config} if listed else config}
    tuner = cls(model=net, adapter_name="a", low_cpu_mem_usage=True, **given)
    assert isinstance(tuner, cls)
    assert list(tuner.peft_config) == ["a"]
    assert isinstance(net[0], tuner.tuner_layer_cls)
    assert {p.device.type for name, p in tuner.named_parameters() if "base_layer" not in name} == {"meta"}


def test_a_layers_class_makes_one() -> None:
    from peft.tuners.lora.layer import Conv2d, Linear

    layer = Linear(nn.Linear(3, 2), "a", peft.LoraConfig(), r=4, lora_alpha=8)
    assert (layer.r, layer.scaling, layer.active_adapters) == ({"a": 4}, {"a": 2.0}, ["a"])
    assert isinstance(layer, Linear)
    assert not isinstance(layer, Conv2d)
    assert layer(torch.ones(1, 3)).shape == (1, 2)
    assert peft.tuners.ia3.Linear(nn.Linear(3, 2), "a", config=peft.IA3Config(feedforward_modules=[])).ia3_l[
        "a"
    ].shape == (2, 1)


def test_a_tuners_class_adapts_what_a_file_names() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = peft.LoraConfig(target_modules=["0"])
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        tuner = peft.LoraModel(net, config, "a", state_dict={"1.lora_A.weight": torch.zeros(1)})
    assert tuner.targeted_module_names == ["1"]


def test_configs_pickle_under_the_names_they_are_imported_by() -> None:
    from peft.tuners.lora.config import LoraConfig

    config = LoraConfig(r=3)
    assert pickle.loads(pickle.dumps(config)) == config


def test_constructors_refuse_unknown_fields_and_functions_keep_their_parameters() -> None:
    with pytest.raises(TypeError):
        peft.LoraConfig(rank=3)
    assert list(inspect.signature(peft.inject_adapter_in_model).parameters)[:3] == [
        "peft_config",
        "model",
        "adapter_name",
    ]
    assert "adapter_names" in inspect.signature(peft.tuners.tuners_utils.BaseTunerLayer.merge).parameters


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import peft, sys; from peft.tuners import lora; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_load_problems_warn() -> None:
    assert inlay.settings.strict_load is False
