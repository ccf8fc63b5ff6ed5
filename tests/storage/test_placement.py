"""Laws of `inlay.storage.placement`: a weight in parts is whole where an adapter computes with it.

Offloaded weights are in ``tests/test_model.py``, where a model runs on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import NotMergeableError

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402

FIELDS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def adapted(fields: dict[str, Any]) -> tuple[nn.Module, inlay.PeftModel]:
    net = nn.Sequential(nn.Linear(8, 6))
    config = inlay.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **fields)
    return net, inlay.get_peft_model(net, config)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [whole(t) for t in (out.detach(), *grads) if t is not None]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_distributed_base_under_plain_factors(mesh: DeviceMesh, fields: dict[str, Any], style: Any) -> None:
    net, model = adapted(fields)
    x = torch.randn(5, 8)
    expected = []
    for mode in (model.eval, model.train):
        mode()
        torch.manual_seed(0)
        expected.append(gradients(model, x))
        model.zero_grad()
    parallelize_module(net[0], mesh, {"base_layer": style()})
    assert isinstance(net[0].base_layer.weight, DTensor)
    for mode, wanted in zip((model.eval, model.train), expected, strict=True):
        mode()
        torch.manual_seed(0)
        for found, t in zip(gradients(model, x), wanted, strict=True):
            torch.testing.assert_close(found, t)
        model.zero_grad()
    with pytest.raises(NotMergeableError, match="DTensor"):
        model.merge_adapter()


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_everything_distributed(mesh: DeviceMesh, fields: dict[str, Any], placement: Any) -> None:
    net, model = adapted(fields)
    x = torch.randn(5, 8)
    expected = gradients(model.eval(), x)
    model.zero_grad()

    def distribute(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, p in module._parameters.items():
            if p is not None:
                t = distribute_tensor(p.detach(), mesh, [placement])
                module._parameters[key] = nn.Parameter(t, requires_grad=p.requires_grad)

    distribute_module(net, mesh, distribute)
    x = distribute_tensor(x, mesh, [Replicate()])
    for found, t in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(found, t)
    assert isinstance(model.train()(x), DTensor)
