"""diffusers' models and pipelines from tiny configs, files for them, and what each file should do, from its formula.

Files are made of shapes and random numbers, and what they should do is written into a plain model's weights: neither
asks the library under test.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")

Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------- models

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(**config: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(**UNET, **{"cross_attention_dim": 8, **config})


def flux(pooled: int = 16) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=pooled,
        axes_dims_rope=(4, 4, 8),
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    )


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def _text() -> Tensor:
    return torch.randn(1, 6, 16)


class Kind(NamedTuple):
    """How one model is made and called, and the argument that carries ``scale``."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    scale: str


MODELS = {
    "unet": Kind(
        unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor(3),
            "encoder_hidden_states": torch.randn(2, 5, 8),
        },
        "cross_attention_kwargs",
    ),
    "flux": Kind(
        flux,
        lambda: {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(1, 16),
            "timestep": torch.tensor([1.0]),
            "img_ids": torch.randn(16, 3),
            "txt_ids": torch.randn(6, 3),
        },
        "joint_attention_kwargs",
    ),
    "sd3": Kind(
        sd3,
        lambda: {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(1, 16),
            "timestep": torch.tensor([1.0]),
        },
        "joint_attention_kwargs",
    ),
    "wan": Kind(
        wan,
        lambda: {
            "hidden_states": torch.randn(1, 4, 2, 8, 8),
            "timestep": torch.tensor([1.0]),
            "encoder_hidden_states": _text(),
        },
        "attention_kwargs",
    ),
}


def made(kind: str) -> Any:
    """The same model at every call."""
    torch.manual_seed(0)
    return MODELS[kind].build().eval()


def output(kind: str, model: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    torch.manual_seed(1)
    inputs = {k: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v for k, v in MODELS[kind].inputs().items()}
    with torch.no_grad():
        out: Tensor = model(**inputs, return_dict=False, **kwargs)[0]
    return out.clone()


# ---------------------------------------------------------------------- files, and what they should do


def layers(model: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(name, layer) of those whose names end so."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and f".{name}".endswith(
            tuple(f".{t}" for t in targets)
        ):
            yield name, module


def lora(
    model: nn.Module,
    seed: int,
    r: int = 4,
    targets: tuple[str, ...] = ATTENTION,
    dora: bool = False,
    size: float = 0.3,
) -> Tensors:
    """A LoRA file of a model without adapters."""
    torch.manual_seed(seed)
    file = {}
    for name, layer in layers(model, targets):
        out, into, *kernel = layer.weight.shape
        file[f"{name}.lora_A.weight"] = torch.randn(r, into, *kernel) * size
        file[f"{name}.lora_B.weight"] = torch.randn(out, r, *[1 for _ in kernel]) * size
        if dora:
            file[f"{name}.lora_magnitude_vector"] = torch.rand(out) + 0.5
    return file


def lokr(model: nn.Module, seed: int, rank: int | None, factor: int = 2) -> Tensors:
    """A LoKr file of ``to_q``, whole, and ``to_v``, of low rank where one is given."""

    def split(n: int) -> tuple[int, int]:
        m = factor if n % factor == 0 else next(m for m in range(int(n**0.5), 0, -1) if n % m == 0)
        return m, n // m

    torch.manual_seed(seed)
    file = {}
    for name, layer in layers(model, ("to_q", "to_v")):
        (a, b), (c, d) = split(layer.out_features), split(layer.in_features)
        file[f"{name}.lokr_w1"] = torch.randn(a, c) * 0.3
        if rank is not None and name.endswith("to_v"):
            file[f"{name}.lokr_w2_a"], file[f"{name}.lokr_w2_b"] = torch.randn(b, rank), torch.randn(rank, d)
        else:
            file[f"{name}.lokr_w2"] = torch.randn(b, d) * 0.3
    return file


def filled(tensors: Tensors, seed: int) -> Tensors:
    """Other numbers in tensors of these shapes, magnitudes above zero."""
    torch.manual_seed(seed)
    values = {k: torch.randn(tensors[k].shape) * 0.3 for k in sorted(tensors)}
    return {k: v.abs() + 0.5 if "magnitude" in k else v for k, v in values.items()}


def changed(layer: Any, p: Tensors, scale: float) -> Tensor:
    """The weight that a layer has with its part of a file, by the method's formula."""
    W = layer.weight
    if "lora_A.weight" in p:
        A, B = p["lora_A.weight"].flatten(1), p["lora_B.weight"].flatten(1)
        new = W + scale * (B @ A).view_as(W)
        if "lora_magnitude_vector" in p:
            m = p["lora_magnitude_vector"].flatten()
            new = (new.flatten(1) * (m / new.flatten(1).norm(dim=1))[:, None]).view_as(W)
        return new
    if "hada_w1_a" in p:
        return W + scale * ((p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])).view_as(W)
    w1, w2 = (p[w] if w in p else p[f"{w}_a"] @ p[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    return W + scale * torch.kron(w1, w2)


def written(model: Any, file: Mapping[str, Tensor], scale: float | Callable[[str], float] = 1.0) -> Any:
    """A plain model with a file in its weights; a layer's scale may depend on its name."""
    parts: dict[str, Tensors] = {}
    for key, t in file.items():
        name, _, _rest = key.partition(next(s for s in (".lora_", ".hada_", ".lokr_") if s in key))
        parts.setdefault(name, {})[key.removeprefix(f"{name}.")] = t
    for name, p in parts.items():
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(changed(layer, p, scale(name) if callable(scale) else scale))
    return model


# ---------------------------------------------------------------------- pipelines


def clip_tokenizer(directory: Path) -> Any:
    letters = string.ascii_lowercase
    words = [*letters, *[f"{c}</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(directory, model_max_length=12)


def t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )


def clip(cls: Any = transformers.CLIPTextModel) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return cls(config).eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4, **config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
        **config,
    ).eval()


SHIFTED: dict[str, Any] = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1,
    "scaling_factor": 1.5,
}


def sd_pipeline(directory: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(directory),
        unet=unet().eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(directory: Path) -> Any:
    model = unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(directory),
        tokenizer_2=clip_tokenizer(directory),
        unet=model.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


def sd3_pipeline(directory: Path) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(**SHIFTED),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(directory),
        tokenizer_2=clip_tokenizer(directory),
        tokenizer_3=t5_tokenizer(),
        transformer=sd3().eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def flux_pipeline(directory: Path) -> Any:
    return diffusers.FluxPipeline(
        vae=vae(1, **SHIFTED),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(directory),
        tokenizer_2=t5_tokenizer(),
        transformer=flux(pooled=8).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
}


def pipeline(kind: str, directory: Path) -> Any:
    """The same pipeline at every call."""
    torch.manual_seed(0)
    pipe = PIPELINES[kind](directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def components(pipe: Any) -> dict[str, Any]:
    """The models that a file may adapt, by the names that its keys begin with."""
    return {name: getattr(pipe, name) for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None}


def image(pipe: Any, **kwargs: Any) -> Tensor:
    """Latents of two steps."""
    if hasattr(pipe, "transformer"):
        kwargs["max_sequence_length"] = 12
    out: Tensor = pipe(
        prompt="a cat",
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="latent",
        height=16,
        width=16,
        generator=torch.manual_seed(7),
        **kwargs,
    )[0]
    return out.clone()


def pipeline_file(pipe: Any, seed: int, r: int = 4, encoders: bool = True, **kwargs: Any) -> Tensors:
    """A file for the models of a pipeline without adapters: for all that a file may adapt, or the denoiser alone."""
    file: Tensors = {}
    for i, (name, model) in enumerate(components(pipe).items()):
        if model is denoiser(pipe):
            part = lora(model, seed + i, r, **kwargs)
        elif encoders:
            part = lora(model, seed + i, r, ENCODER, kwargs.get("dora", False))
        else:
            continue
        file.update({f"{name}.{key}": t for key, t in part.items()})
    return file


def pipeline_written(pipe: Any, file: Tensors, scale: float | Callable[[str], float] = 1.0) -> Any:
    """A pipeline with a file in its weights."""
    for name, model in components(pipe).items():
        own = {k.removeprefix(f"{name}."): t for k, t in file.items() if k.startswith(f"{name}.")}
        written(model, own, (lambda path, name=name: scale(f"{name}.{path}")) if callable(scale) else scale)
    return pipe
