"""LoftQ (https://arxiv.org/abs/2310.08659): factors that make up for what quantising the weight loses.

    Q <- quantise(W0 - s B A),  s B A <- the best approximation of W0 - Q of rank r,  alternating

4 and 2 bits are NormalFloat (QLoRA, https://arxiv.org/abs/2305.14314): blocks of 64 over their largest magnitude, each
value taken to the nearest of 2^bits quantiles of the normal distribution. 8 bits are integers, scaled by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.errors import ConfigError
from inlay.inits.decompose import Start, _filled, largest, wide

_BLOCK = 64
_MOST_ROUNDS = 10  # each is a singular value decomposition, and a config may come from a file

# Floats of 4 bits (sign, 2 of exponent, 1 of mantissa) over the largest of them, 12; there is one subnormal.
_FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


@dataclass
class LoftQConfig:
    """How ``init_lora_weights="loftq"`` quantises.

    Args:
        loftq_bits (`int`, *optional*, defaults to 4): 2, 4 or 8.
        loftq_iter (`int`, *optional*, defaults to 1): Rounds of quantising and approximating, up to 10.
        quant_type (`str`, *optional*, defaults to `"nf4"`): ``"fp4"`` for a base that will be packed so; 4 bits only.

    Raises:
        ConfigError: A value is none of these.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1
    quant_type: str = "nf4"

    def __post_init__(self) -> None:
        if type(self.loftq_bits) is not int or self.loftq_bits not in (2, 4, 8):
            raise ConfigError(f"loftq_bits must be 2, 4 or 8, got {self.loftq_bits!r}.")
        if type(self.loftq_iter) is not int or not 1 <= self.loftq_iter <= _MOST_ROUNDS:
            raise ConfigError(f"loftq_iter must be 1 to {_MOST_ROUNDS}, got {self.loftq_iter!r}.")
        if self.quant_type != "nf4" and (self.quant_type, self.loftq_bits) != ("fp4", 4):
            raise ConfigError(f"quant_type must be 'nf4', or 'fp4' with 4 bits, got {self.quant_type!r}.")


def codebook(name: str, bits: int = 4) -> Tensor:
    """The values, ascending and within [-1, 1], that a block over its largest magnitude is taken to.

    Args:
        name (`str`): ``"nf"`` for NormalFloat, ``"fp"`` for floats of 4 bits.
        bits (`int`, *optional*, defaults to 4): How many, of NormalFloat.

    Example:
        >>> codebook("nf", 2)
        tensor([-1.0000,  0.0000,  0.4358,  1.0000])
    """
    if name == "fp":
        magnitudes = torch.tensor(_FP4) / _FP4[-1]
        return torch.cat([-magnitudes[1:].flip(0), magnitudes])
    half = 2 ** (bits - 1)
    # The outermost quantile lies half a step inside: the mean of that of the positive and of the negative side.
    last = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2

    def quantiles(count: int) -> Tensor:
        p = torch.linspace(0.5, last, count + 1, dtype=torch.float64)[1:]
        return torch.erfinv(2 * p - 1)

    # One more above zero than below; zero itself is exact.
    values = torch.cat([-quantiles(half - 1).flip(0), torch.zeros(1, dtype=torch.float64), quantiles(half)])
    return (values / values.abs().max()).float()


def quantise(W_OI: Tensor, bits: int = 4, name: str = "nf") -> Tensor:
    """The nearest weight that ``bits`` per value can hold, dense and in the dtype of ``W_OI``."""
    if bits == 8:
        W_OI, dtype = W_OI.half().float(), W_OI.dtype  # as the 8-bit layers of bitsandbytes see it
        top_O1 = W_OI.abs().amax(1, keepdim=True).clamp(min=1e-12)
        return ((W_OI * (127 / top_O1)).round() * top_O1 / 127).to(dtype)
    values = codebook(name, bits).to(W_OI)
    flat = W_OI.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    top = blocks.abs().amax(1, keepdim=True)
    at = torch.bucketize(blocks / top.clamp(min=torch.finfo(top.dtype).tiny), (values[1:] + values[:-1]) / 2)
    return (values[at] * top).flatten()[: flat.numel()].view(W_OI.shape)


def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as ``num_bits`` hold it, dense, and the factors (R x I, O x R) that make up for what is lost.

    Args:
        weight (`Tensor`): The weight, O x I.
        num_bits (`int`): 2, 4 or 8.
        reduced_rank (`int`): R.
        num_iter (`int`, *optional*, defaults to 1): Rounds, up to 10.

    Raises:
        ConfigError: A number is none of these, or the weight is no matrix.

    Example:
        >>> Q_OI, down_RI, up_OR = loftq_init(torch.linspace(-1, 1, 24).reshape(4, 6), 2, 2)
        >>> Q_OI.unique().shape, down_RI.shape, up_OR.shape
        (torch.Size([4]), torch.Size([2, 6]), torch.Size([4, 2]))
    """
    if weight.dim() != 2:
        raise ConfigError(f"The weight must be a matrix, got {list(weight.shape)}: LoftQ is defined on one.")
    how = LoftQConfig(num_bits, num_iter)
    start = loftq(weight.detach(), reduced_rank, 1.0, how.loftq_bits, how.loftq_iter)
    assert start.offset_OI is not None, "what quantising loses"
    return (weight.detach() + start.offset_OI).to(weight.dtype), start.down_RI, start.up_OR


def loftq(W_OI: Tensor, r: int, scale: float, bits: int = 4, rounds: int = 1, name: str = "nf") -> Start:
    """Factors such that the quantised weight with them is close to ``W``; the offset is quantised minus ``W``.

    Args:
        W_OI (`Tensor`): The weight.
        r (`int`): The rank.
        scale (`float`): What the update is multiplied by; not 0.
        bits (`int`, *optional*, defaults to 4), rounds (`int`, *optional*, defaults to 1), name (`str`, *optional*,
            defaults to `"nf"`): See `LoftQConfig` and `codebook`.

    Example:
        >>> W = torch.linspace(-1, 1, 24).reshape(4, 6)
        >>> start = loftq(W, 2, 1.0, bits=2)
        >>> with_factors = W + start.offset_OI + start.up_OR @ start.down_RI
        >>> bool((with_factors - W).norm() < start.offset_OI.norm() / 2)
        True
    """
    W_OI = wide(W_OI)
    Q_OI = quantise(W_OI, bits, name)
    down_RI, up_OR = largest(W_OI - Q_OI, r, scale)
    for _ in range(rounds - 1):
        Q_OI = quantise(W_OI - scale * up_OR @ down_RI, bits, name)
        down_RI, up_OR = largest(W_OI - Q_OI, r, scale)
    start = _filled(down_RI, up_OR, r)
    return Start(start.down_RI, start.up_OR, Q_OI - W_OI)
