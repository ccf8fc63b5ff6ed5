"""What there is on this machine: devices and libraries, for scripts that choose by them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import torch
from packaging.version import Version


def infer_device() -> str:
    """The type of device to compute on: the accelerator's, such as ``"cuda"``, where there is one, else ``"cpu"``.

    Example:
        >>> torch.zeros(2, device=infer_device()).sum().item()
        0.0
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def installed(library: str) -> bool:
    """Whether a library can be imported; it is not.

    Example:
        >>> installed("torch"), installed("no_such_library")
        (True, False)
    """
    return importlib.util.find_spec(library) is not None


def has_device(kind: str) -> bool:
    """Whether there is a device of a type such as ``"xpu"``."""
    return infer_device() == kind


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers trains with DeepSpeed's ZeRO-3 in this process."""
    module = sys.modules.get("transformers.integrations.deepspeed")
    return module is not None and bool(module.is_deepspeed_zero3_enabled())


def is_version(library: str, at_least: str = "0", at_most: str | None = None) -> bool:
    """Whether a library is installed in a version from ``at_least`` on, and up to ``at_most`` and its patches.

    Example:
        >>> is_version("torch", at_least="2.6"), is_version("torch", at_most="1.13")
        (True, False)
    """
    if not installed(library):
        return False
    found = Version(importlib.metadata.version(library))
    below = at_most is None or found.release[: len(Version(at_most).release)] <= Version(at_most).release
    return found >= Version(at_least) and below
