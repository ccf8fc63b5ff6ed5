"""Run twice, as two processes that share a model by FSDP2: writes what went wrong as JSON, case by case.

python sharded.py RANK FOLDER
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import two_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import inlay
from inlay.errors import NotMergeableError, UnwritableError

TARGETS = {"target_modules": ["lin0", "lin1"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: inlay.LoraConfig(r=2, init_lora_weights=False, **TARGETS),
    "DoRA": lambda: inlay.LoraConfig(r=2, init_lora_weights=False, use_dora=True, **TARGETS),
    "LoHa": lambda: inlay.LoHaConfig(r=2, init_weights=False, **TARGETS),
    "a head": lambda: inlay.LoraConfig(r=2, init_lora_weights=False, modules_to_save=["head"], **TARGETS),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class Pair(NamedTuple):
    """A model whole, and the same in parts."""

    base: nn.Module
    whole: inlay.PeftModel
    parted: inlay.PeftModel
    x: Tensor
    folder: Path

    def alike(self) -> None:
        torch.testing.assert_close(self.parted(self.x), self.whole(self.x))
        mine, wanted = tensors(self.parted), tensors(self.whole)
        assert list(mine) == list(wanted)
        for key, t in mine.items():
            assert isinstance(t, DTensor), key
            torch.testing.assert_close(t.full_tensor(), wanted[key])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return inlay.get_peft_model_state_dict(model)


def make(config: str, folder: Path) -> Pair:
    torch.manual_seed(0)
    base, x = Net(), torch.randn(4, 10)
    whole = inlay.get_peft_model(copy.deepcopy(base), CONFIGS[config]())
    parted, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (2,))
    for layer in parted.get_base_model().children():
        fully_shard(layer, mesh=mesh)
    fully_shard(parted, mesh=mesh)
    return Pair(base, whole, parted, x, folder / config)


# ---------------------------------------------------------------- cases


def is_the_same_model(pair: Pair) -> None:
    pair.alike()


def trains_alike(pair: Pair) -> None:
    for model in (pair.whole, pair.parted):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(pair.x).square().mean().backward()
        optimizer.step()
    pair.alike()


def takes_parts(pair: Pair) -> None:
    for model in (pair.whole, pair.parted):
        assert inlay.set_peft_model_state_dict(model, {k: 2 * t for k, t in tensors(model).items()}).ok
    pair.alike()


def takes_whole_tensors(pair: Pair) -> None:
    values = {k: 3 * t for k, t in tensors(pair.whole).items()}
    for model in (pair.whole, pair.parted):
        assert inlay.set_peft_model_state_dict(model, values).ok
    pair.alike()


def gives_parts_to_a_whole_model(pair: Pair) -> None:
    inlay.set_peft_model_state_dict(pair.parted, {k: 2 * t for k, t in tensors(pair.parted).items()})
    assert inlay.set_peft_model_state_dict(pair.whole, tensors(pair.parted)).ok
    pair.alike()


def saves_what_is_gathered(pair: Pair) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    gathered = get_model_state_dict(pair.parted, options=options)
    if dist.get_rank() == 0:
        pair.parted.save_pretrained(pair.folder, state_dict=gathered)
    dist.barrier()
    again = inlay.PeftModel.from_pretrained(copy.deepcopy(pair.base), pair.folder).train()
    torch.testing.assert_close(again(pair.x), pair.whole(pair.x))
    inlay.set_peft_model_state_dict(pair.parted, {k: 0 * t for k, t in tensors(pair.parted).items()})
    assert pair.parted.load_adapter(pair.folder, "default").ok  # in place of the zeros
    pair.alike()


def refuses_to_save_parts(pair: Pair) -> None:
    with pytest.raises(UnwritableError, match="several processes"):
        pair.parted.save_pretrained(pair.folder)


def merges_in_parts(pair: Pair) -> None:
    pair.parted.merge_adapter()
    torch.testing.assert_close(pair.parted(pair.x), pair.whole(pair.x))
    pair.parted.unmerge_adapter()
    pair.alike()


def refuses_to_merge_what_turns_the_whole_weight(pair: Pair) -> None:
    config = inlay.OFTConfig(oft_block_size=5, r=0, init_weights=False, **TARGETS)
    parted = inlay.get_peft_model(pair.base, config)
    for layer in parted.get_base_model().children():
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(parted, mesh=init_device_mesh("cpu", (2,)))
    wanted = parted(pair.x)
    with pytest.raises(NotMergeableError, match="turns it as a whole"):
        parted.merge_adapter()
    torch.testing.assert_close(parted(pair.x), wanted)


CASES = [
    is_the_same_model,
    trains_alike,
    takes_parts,
    takes_whole_tensors,
    gives_parts_to_a_whole_model,
    saves_what_is_gathered,
    refuses_to_save_parts,
    merges_in_parts,
    refuses_to_merge_what_turns_the_whole_weight,
]
NAMES = [f"{case.__name__}[{config}]" for case in CASES for config in CONFIGS]


def on(folder: Path, case: Callable[[Pair], None], config: str) -> None:
    case(make(config, folder / case.__name__))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    runs = [(case, config) for case in CASES for config in CONFIGS]
    two_processes.go_through(rank, folder, zip(NAMES, [partial(on, folder, *run) for run in runs], strict=True))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
