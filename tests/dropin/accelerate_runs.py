"""Run twice, as two processes under accelerate's FSDP: writes what went wrong as JSON, case by case.

python accelerate_runs.py RANK FOLDER PORT
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import torch.distributed as dist
import two_processes
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import fsdp_utils
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from dropin import tiny_transformers as tiny

CONFIGS: dict[str, Callable[[], Any]] = {
    adapter: lambda adapter=adapter: tiny.config("llama", adapter) for adapter in ("lora", "loha", "dora", "head")
}
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}
TOKENS = tiny.batch("llama")["input_ids"]


def handle(config: str) -> Any:
    torch.manual_seed(1)
    made = peft.get_peft_model(tiny.build("llama"), {**CONFIGS, **PROMPTS}[config]())
    if config in CONFIGS:
        tiny.stir(made)
    return made


def accelerator(kind: str) -> tuple[Any, Any]:
    """An accelerator with FSDP2, which accelerate itself takes up on other devices than the CPU alone."""
    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=kind,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    made = accelerate.Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
    return made, plugin


def trained(parameters: Any, learning_rate: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=learning_rate)


def step(model: Any, optimizer: Any, backward: Callable[[Tensor], None]) -> None:
    for _ in range(2):
        backward(model(input_ids=TOKENS, labels=TOKENS).loss)
        optimizer.step()
        optimizer.zero_grad()


def zero(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()


def prepared(config: str, kind: str) -> tuple[Any, Any, Any, Any]:
    """accelerator, plugin, the model in parts and the same whole, both trained for two steps."""
    made, plugin = accelerator(kind)
    model = handle(config)
    whole = copy.deepcopy(model)
    parted, optimizer = made.prepare(model, trained(model.parameters()))
    step(parted, optimizer, made.backward)
    step(whole, trained(whole.parameters()), lambda loss: loss.backward())
    same(parted, whole)
    return made, plugin, parted, whole


def same(model: Any, whole: Any) -> None:
    torch.testing.assert_close(tiny.output(model, "llama"), tiny.output(whole, "llama"))


def differ(model: Any, whole: Any) -> None:
    assert float((tiny.output(model, "llama") - tiny.output(whole, "llama")).abs().max()) > 1e-3


def is_a_handle(config: str, folder: Path) -> None:
    made, _, parted, _ = prepared(config, "SHARDED_STATE_DICT")
    assert fsdp_utils.is_peft_model(parted)
    assert isinstance(made.unwrap_model(parted), peft.PeftModel)
    assert parted.active_adapter == "default"


def adapter_alone_is_saved_and_loaded_in_parts(config: str, folder: Path) -> None:
    made, plugin, parted, whole = prepared(config, "SHARDED_STATE_DICT")
    fsdp_utils.save_fsdp_model(plugin, made, parted, folder, adapter_only=True)
    zero(parted)
    differ(parted, whole)
    fsdp_utils.load_fsdp_model(plugin, made, parted, folder, adapter_only=True)
    same(parted, whole)


def adapter_alone_is_gathered(config: str, folder: Path) -> None:
    made, plugin, parted, whole = prepared(config, "FULL_STATE_DICT")
    fsdp_utils.save_fsdp_model(plugin, made, parted, folder, adapter_only=True)
    dist.barrier()
    gathered = torch.load(folder / "pytorch_model_fsdp.bin")
    live = {key: p for key, p in whole.named_parameters() if p.requires_grad}
    assert gathered.keys() == live.keys()
    for key, t in gathered.items():
        torch.testing.assert_close(t, live[key].data)


def state_is_saved_and_loaded(config: str, folder: Path) -> None:
    made, _, parted, whole = prepared(config, "SHARDED_STATE_DICT")
    made.save_state(str(folder))
    zero(parted)
    differ(parted, whole)
    made.load_state(str(folder))
    same(parted, whole)


def gathered_state_becomes_a_folder(config: str, folder: Path) -> None:
    made, _, parted, whole = prepared(config, "SHARDED_STATE_DICT")
    state = made.get_state_dict(parted)
    made.unwrap_model(parted).save_pretrained(folder, state_dict=state, is_main_process=made.is_main_process)
    dist.barrier()
    same(peft.PeftModel.from_pretrained(tiny.build("llama"), folder), whole)


def fsdp1_trains_with_the_policy(config: str, folder: Path) -> None:
    model = handle(config)
    whole = copy.deepcopy(model)
    policy = fsdp_auto_wrap_policy(model)
    parted = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    assert len(FSDP.fsdp_modules(parted)) > 2
    for each in (parted, whole):
        step(each, trained(each.parameters(), 20.0), lambda loss: loss.backward())
    same(parted, whole)
    differ(whole, handle(config))


CASES = {
    is_a_handle: ["lora"],
    adapter_alone_is_saved_and_loaded_in_parts: list(CONFIGS),
    adapter_alone_is_gathered: ["lora", "loha", "head"],
    state_is_saved_and_loaded: ["lora", "loha", "head"],
    gathered_state_becomes_a_folder: ["dora", "loha", "head"],
    fsdp1_trains_with_the_policy: ["lora", "loha", "head", *PROMPTS],
}
NAMES = [f"{case.__name__}[{config}]" for case, configs in CASES.items() for config in configs]


def main(rank: int, folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's own, of FSDP on the CPU
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    accelerator("SHARDED_STATE_DICT")  # starts the processes' group
    runs = [(case, config) for case, configs in CASES.items() for config in configs]
    cases = [(name, partial(case, config, folder / name)) for name, (case, config) in zip(NAMES, runs, strict=True)]
    two_processes.go_through(rank, folder, cases)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
