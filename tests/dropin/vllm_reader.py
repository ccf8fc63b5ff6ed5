"""What vLLM and sglang make of a saved adapter: their rules for its two files; {module: (A_RI, B_OR, scale)}."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Factors = dict[str, tuple[Tensor, Tensor, float]]
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


class Refused(ValueError):
    """The server would not load it."""


def _open(folder: Path, max_rank: int) -> tuple[dict, dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in config]:
        raise Refused(f"no {missing}")
    if not 0 < config["r"] <= max_rank or max_rank not in MAX_RANKS:
        raise Refused(f"rank {config['r']} where the server has {max_rank}")
    safe = folder / "adapter_model.safetensors"
    return config, load_file(safe) if safe.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)


def _paired(tensors: dict[str, Tensor], scale: float) -> Factors:
    halves: dict[str, dict[str, Tensor]] = {}
    for key in (k for k in tensors if not k.endswith(SKIPPED)):
        found = FACTOR.fullmatch(key)
        if not found or found[1].split(".")[-1] not in LEAVES:
            raise Refused(f"{key} is unsupported LoRA weight")
        halves.setdefault(found[1], {})[found[2] or found[3]] = tensors[key].float()
    return {module: (half["A"], half["B"], scale) for module, half in halves.items()}


def vllm(folder: Path, max_rank: int = 64) -> Factors:
    config, tensors = _open(folder, max_rank)
    if config.get("bias", "none") != "none" or config.get("modules_to_save") or config.get("use_dora"):
        raise Refused("bias, modules_to_save or use_dora")
    if isinstance(config["target_modules"], str) and not re.search(r"\([\w|]+\)\$$", config["target_modules"]):
        raise Refused("an expression that does not end in (a|b)$")
    return _paired(tensors, config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1))


def sglang(folder: Path, max_rank: int = 64) -> Factors:
    config, tensors = _open(folder, max_rank)
    if config["peft_type"].lower() != "lora" or isinstance(config["target_modules"], str):
        raise Refused("no LoRA, or no list of target_modules")
    read = _paired(tensors, config["lora_alpha"] / config["r"])
    if any(m.endswith("q_proj") and m.replace("q_proj", "v_proj") not in read for m in read):
        raise Refused("q_proj without v_proj")
    return read
