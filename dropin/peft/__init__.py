"""inlay under the PEFT library's name: what imports ``peft`` runs on inlay, unchanged.

Every public module and name of PEFT 0.21.2 can be imported from where it is there. A name is looked up when it is
first used, so that importing this package costs next to nothing: `peft._surface` lists the names, `peft._resolve` says
which object of inlay's each one is. There is no logic here.
"""

from __future__ import annotations

from peft import _finder

# First: a thread that finds this package half imported finds its modules already.
__getattr__, __dir__, __all__ = _finder.open_package(__name__)

import inlay.settings  # noqa: E402

__version__ = "0.21.2"

# PEFT warns of what is wrong with a file where inlay raises; scripts that were written for it expect that.
inlay.settings.strict_load = False
