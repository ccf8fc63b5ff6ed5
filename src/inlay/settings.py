"""The one setting of the library: ``inlay.settings.strict_load``.

It is what ``strict=None`` means to `load_adapter` and `from_pretrained`: raise for everything in a file that would
silently change results (``True``), or load what fits and warn (``False``). A program sets it once, before it loads
anything. The drop-in that stands in for PEFT sets it to ``False``: its users' scripts expect that. It says the same of
keywords that a config does not know.
"""

from __future__ import annotations

strict_load: bool = True
