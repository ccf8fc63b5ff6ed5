"""The drop-in's modules are found, walked, reloaded and patched as files are."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from unittest import mock

import peft
import pytest
from peft import import_utils
from peft._surface import SURFACE

import inlay.config
import inlay.functional
import inlay.integrations.hub


def test_modules_are_listed_and_walked() -> None:
    assert {"tuners", "utils", "config", "peft_model"} <= {m.name for m in pkgutil.iter_modules(peft.__path__)}
    walked = {m.name: m.ispkg for m in pkgutil.walk_packages(peft.__path__, "peft.")}
    assert set(SURFACE) - {"peft"} <= set(walked)
    assert walked["peft.tuners.lora"]
    assert not walked["peft.tuners.lora.layer"]
    assert [m.name for m in pkgutil.iter_modules(peft.optimizers.__path__)] == ["lorafa", "loraplus", "riemannian"]


@pytest.mark.parametrize("name", ["peft", "peft.tuners.lora", "peft.tuners.lora.layer"])
def test_modules_have_a_spec_and_a_file(name: str) -> None:
    module = importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.name == name
    assert inspect.getsourcefile(module) == inspect.getfile(module) == spec.origin
    assert "peft" in spec.origin


def test_classes_and_modules_have_a_file() -> None:
    assert inspect.getmodule(peft.tuners.lora.layer.Linear) is peft.tuners.lora.layer
    assert inspect.getfile(peft.tuners.lora.layer.Linear).endswith(".py")
    assert importlib.util.find_spec("peft.tuners.nothing") is None


def test_reloading_keeps_what_is_known() -> None:
    before = peft.LoraConfig, peft.tuners.lora, len(peft.__path__)
    assert importlib.reload(peft) is peft
    assert importlib.reload(peft.tuners.lora) is before[1]
    assert (peft.LoraConfig, peft.tuners.lora, len(peft.__path__)) == before
    assert peft.tuners.lora.LoraConfig is before[0]


def test_a_module_can_be_the_first_that_is_imported() -> None:
    code = "import peft.tuners.lora.layer as l; from peft.utils.other import *; print(l.Linear.__name__, transpose)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("Linear <function transpose")


def test_what_asks_for_libraries_is_a_function_like_any_other() -> None:
    found = [getattr(import_utils, name) for name in import_utils.__all__ if name.endswith("_available")]
    assert len(found) > 9
    for ask in found:
        assert getattr(import_utils, ask.__name__) is ask
        assert functools.wraps(ask)(lambda: None).__module__ == "peft.import_utils"
        assert set(inspect.signature(ask).parameters) <= {"check_device"}
        ask.cache_clear()
        assert isinstance(ask(), bool)


@pytest.mark.parametrize(
    ("version", "written"),
    [("0.99.0", "0.99.0"), ("1.0.0rc1", "1.0.0rc1"), ("0.21.3.dev0", "0.21.3.dev0@UNKNOWN")],
)
def test_a_version_that_is_set_is_written(monkeypatch, tmp_path, version: str, written: str) -> None:
    assert peft.config.__version__ == peft.__version__
    with monkeypatch.context() as patched:
        patched.setattr("peft.config.__version__", version)
        peft.LoraConfig().save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == written
        assert peft.LoraConfig.from_pretrained(tmp_path).peft_version == written  # a file keeps its own
    assert inlay.config.FORMAT_VERSION == peft.config.__version__ == peft.__version__
    assert peft.LoraConfig().peft_version == peft.__version__


def test_patching_reaches_where_inlay_looks_and_is_undone(tmp_path) -> None:
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    real = inlay.integrations.hub.hf_hub_download
    # `peft.utils.other` is where PEFT defines it, and the others have it from there
    freezing = inlay.functional.freeze_adapter
    for module in ("peft.config", "peft.utils.save_and_load", "peft.peft_model"):
        with mock.patch(f"{module}.hf_hub_download", return_value=str(tmp_path / "adapter_config.json")) as download:
            assert peft.PeftConfig.from_pretrained("some/adapter").r == 3
        assert download.called
        assert inlay.integrations.hub.hf_hub_download is real
    with mock.patch("peft.utils.other._freeze_adapter") as patched:
        assert inlay.functional.freeze_adapter is patched
    assert inlay.functional.freeze_adapter is freezing is peft.utils.other._freeze_adapter
    with mock.patch("peft.utils._freeze_adapter") as patched:
        assert peft.utils._freeze_adapter is patched
        assert inlay.functional.freeze_adapter is freezing is peft.utils.other._freeze_adapter
    assert peft.utils._freeze_adapter is freezing


def test_patching_a_class_stays_where_it_was_patched(monkeypatch) -> None:
    was = peft.tuners.lora.layer.Linear
    with mock.patch("peft.tuners.lora.layer.Linear") as patched:
        assert peft.tuners.lora.layer.Linear is patched
        assert peft.tuners.lora.Linear is was
    assert peft.tuners.lora.layer.Linear is was
    with monkeypatch.context() as context:
        context.setattr(peft, "PeftModel", None)
        assert inlay.PeftModel is not None
    assert peft.PeftModel is inlay.PeftModel
    with pytest.raises(AttributeError):
        mock.patch("peft.config.nothing").start()
