"""Method x option x layer that PEFT has too, for the parity tests; LoRA's own are in `cases`."""

from __future__ import annotations

from typing import Any

from parity.cases import Case

LINEARS, M = {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["m"]}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
LOHA = {"peft_type": "LOHA", "r": 3, "alpha": 5}
LOKR = {"peft_type": "LOKR", "r": 1, "alpha": 0.5}
OFT = {"peft_type": "OFT", "oft_block_size": 4}
IA3: dict[str, Any] = {"peft_type": "IA3", "feedforward_modules": []}
IA3_INTO = {**IA3, "feedforward_modules": ["m"]}
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6}
FULL = {**LOKR, "r": 8}
EFFECTIVE = {"use_effective_conv2d": True}
OUTER = ("hada_w1_a", "hada_w2_a")
QV = {"target_modules": ["q_proj", "v_proj"]}
FAN = {"fan_in_fan_out": True}

CELLS: dict[str, Case] = {
    "loha-linear": Case("linears-3d", {**LOHA, **LINEARS}),
    "loha-linear-low": Case("linears", {**LOHA, **LINEARS, "r": 1}),
    "loha-linear-patterns": Case(
        "linears", {**LOHA, **LINEARS, "rank_pattern": {"lin0": 2}, "alpha_pattern": {"^lin1$": 32}}
    ),
    "loha-linear-random": Case("linears", {**LOHA, **LINEARS, "init_weights": False}),
    "loha-linear-saved": Case("linears", {**LOHA, **LINEARS, "modules_to_save": ["head"]}),
    "loha-conv1d": Case("conv1d", {**LOHA, **M}),
    "loha-conv2d": Case("conv2d", {**LOHA, **M}),
    "loha-conv2d-oblong": Case("conv2d-oblong", {**LOHA, **M}),
    "loha-conv2d-same": Case("conv2d-same", {**LOHA, **M}),
    "loha-conv2d-dilated": Case("conv2d-dilated", {**LOHA, **M}),
    "loha-conv2d-grouped": Case("conv2d-grouped", {**LOHA, **M}),
    "loha-conv2d-point-effective": Case("conv2d-point", {**LOHA, **M, **EFFECTIVE}),
    "loha-conv1d-effective": Case("conv1d", {**LOHA, **M, **EFFECTIVE}, wrong=OUTER),
    "loha-conv2d-effective": Case("conv2d", {**LOHA, **M, **EFFECTIVE}, wrong=OUTER),
    "loha-conv2d-oblong-effective": Case("conv2d-oblong", {**LOHA, **M, **EFFECTIVE}, wrong=OUTER),
    "loha-some-layers": Case("stack", {**LOHA, **QV, "layers_to_transform": [1, 4]}),
    "lokr-linear": Case("linears-3d", {**LOKR, **LINEARS}),
    "lokr-linear-full": Case("linears", {**FULL, **LINEARS}),
    "lokr-linear-both": Case("linears", {**LOKR, **LINEARS, "decompose_both": True}),
    "lokr-linear-factor": Case("linears", {**LOKR, **LINEARS, "decompose_factor": 2}),
    "lokr-linear-large-factor": Case("linears", {**LOKR, **LINEARS, "decompose_factor": 10, "decompose_both": True}),
    "lokr-linear-odd-factor": Case("linears", {**LOKR, **LINEARS, "decompose_factor": 7}),
    "lokr-linear-factor-one": Case("linears", {**LOKR, **LINEARS, "decompose_factor": 1}),
    "lokr-linear-patterns": Case(
        "linears", {**LOKR, **LINEARS, "rank_pattern": {"lin0": 2}, "alpha_pattern": {"^lin1$": 32}}
    ),
    "lokr-linear-random": Case("linears", {**LOKR, **LINEARS, "init_weights": False}),
    "lokr-linear-lycoris": Case("linears", {**LOKR, **LINEARS, "init_weights": "lycoris"}),
    "lokr-some-layers": Case("stack", {**LOKR, **QV, "layers_to_transform": 2, "layers_pattern": "layers"}),
    "lokr-exclude": Case("stack", {**LOKR, **QV, "exclude_modules": r".*\.[0-3]\.v_proj"}),
    "lokr-conv1d": Case("conv1d", {**LOKR, **M}),
    "lokr-conv1d-full": Case("conv1d", {**FULL, **M}),
    "lokr-conv2d": Case("conv2d", {**LOKR, **M}),
    "lokr-conv2d-full": Case("conv2d", {**FULL, **M}),
    "lokr-conv2d-both": Case("conv2d", {**LOKR, **M, "decompose_both": True, "decompose_factor": 4}),
    "lokr-conv2d-effective": Case("conv2d", {**LOKR, **M, **EFFECTIVE}),
    "lokr-conv2d-oblong-effective": Case(
        "conv2d-oblong", {**LOKR, **M, **EFFECTIVE, "decompose_both": True, "decompose_factor": 4}
    ),
    "lokr-conv2d-same": Case("conv2d-same", {**LOKR, **M}),
    "lokr-conv2d-dilated": Case("conv2d-dilated", {**LOKR, **M}),
    "lokr-conv2d-grouped": Case("conv2d-grouped", {**LOKR, **M}),
    "oft-linear": Case("linears-3d", {**OFT, **LINEARS}),
    "oft-linear-blocks": Case("linears", {**OFT, **LINEARS, "r": 2, "oft_block_size": 0}),
    "oft-linear-shared": Case("linears", {**OFT, **LINEARS, "block_share": True}),
    "oft-linear-coft": Case("linears", {**OFT, **LINEARS, "coft": True, "eps": 0.3}),
    "oft-linear-coft-shared": Case("linears", {**OFT, **LINEARS, "coft": True, "eps": 0.3, "block_share": True}),
    "oft-linear-exact": Case("linears", {**OFT, **LINEARS, "use_cayley_neumann": False}),
    "oft-linear-exact-shared": Case(
        "linears", {**OFT, **LINEARS, "r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True}
    ),
    **{
        f"oft-linear-{terms}-terms": Case("linears", {**OFT, **LINEARS, "num_cayley_neumann_terms": terms})
        for terms in (2, 3, 4, 7)
    },
    "oft-linear-no-divisor": Case("linears", {**OFT, **LINEARS, "oft_block_size": 7}),
    "oft-linear-no-divisor-blocks": Case("linears", {**OFT, **LINEARS, "r": 7, "oft_block_size": 0}),
    "oft-linear-random": Case("linears", {**OFT, **LINEARS, "init_weights": False}),
    "oft-linear-biases": Case("linears", {**OFT, **LINEARS, "bias": "oft_only"}),
    "oft-some-layers": Case("stack", {**OFT, **QV, "layers_to_transform": [1, 4], "exclude_modules": ["v_proj"]}),
    "oft-embedding": Case("embedding", {**OFT, **M}),
    "oft-embedding-exact": Case(
        "embedding-padding", {**OFT, **M, "r": 2, "oft_block_size": 0, "use_cayley_neumann": False}
    ),
    "oft-conv2d-point": Case("conv2d-point", {**OFT, **M}),
    "oft-conv2d-point-blocks": Case("conv2d-point", {**OFT, **M, "r": 4, "oft_block_size": 0}),
    "oft-conv2d-point-coft": Case("conv2d-point", {**OFT, **M, "coft": True, "eps": 0.3, "use_cayley_neumann": False}),
    "ia3-linear": Case("linears-3d", {**IA3, **LINEARS}),
    "ia3-linear-into": Case("linears", {**IA3, **LINEARS, "feedforward_modules": ["lin0"]}),
    "ia3-linear-by-regex": Case("linears", {**IA3, "target_modules": r"lin\d", "feedforward_modules": r".*lin1"}),
    "ia3-linear-random": Case("linears", {**IA3, **LINEARS, "init_ia3_weights": False}),
    "ia3-linear-saved": Case("linears", {**IA3, **LINEARS, "modules_to_save": ["norm"]}),
    "ia3-exclude": Case("stack", {**IA3, **QV, "exclude_modules": ["layers.0.q_proj", "v_proj"]}),
    "ia3-gpt2-conv1d": Case("gpt2-conv1d", {**IA3, **M, **FAN}),
    "ia3-gpt2-conv1d-into": Case("gpt2-conv1d", {**IA3_INTO, **M, **FAN}),
    "ia3-conv2d": Case("conv2d", {**IA3, **M}),
    "ia3-conv2d-into": Case("conv2d", {**IA3_INTO, **M}),
    "ia3-conv2d-oblong-into": Case("conv2d-oblong", {**IA3_INTO, **M}),
    "ia3-conv2d-grouped": Case("conv2d-grouped", {**IA3, **M}),
    "ia3-conv2d-grouped-into": Case("conv2d-grouped", {**IA3_INTO, **M}),
    "ia3-conv3d": Case("conv3d", {**IA3, **M}),
    "ia3-conv3d-into": Case("conv3d", {**IA3_INTO, **M}),
    "adalora-linear": Case("linears-3d", {**ADALORA, **LINEARS}),
    "adalora-linear-random": Case("linears", {**ADALORA, **LINEARS, "init_lora_weights": False}),
    "adalora-gpt2-conv1d": Case("gpt2-conv1d", {**ADALORA, **M, **FAN}),
    "adalora-conv2d": Case("conv2d", {**ADALORA, **M}),
    "adalora-conv2d-dilated": Case("conv2d-dilated", {**ADALORA, **M}),
    "adalora-conv2d-same": Case("conv2d-same", {**ADALORA, **M}),
}
