"""The command line: parsing and display over public functions.

``main`` turns every error that the library raises by name into one message and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
import time


def main() -> None:
    """Run ``inlay`` with the arguments of this process."""
    begun = time.perf_counter()
    # It reports, while it is imported, which of its kernels this machine lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from inlay.cli.app import run
    except ImportError as error:
        sys.exit(f"inlay's command line needs {error.name}; pip install 'inlay[train]'")
    debug = "--debug" in sys.argv[1:]
    from inlay.errors import PeftError

    try:
        run([argument for argument in sys.argv[1:] if argument != "--debug"], begun)
    except PeftError as error:
        _fail(f"{type(error).__name__}: {error}", debug)
    except ImportError as error:
        _fail(f"{error}; pip install 'inlay[train]'", debug)


def _fail(message: str, debug: bool) -> None:
    if debug:
        raise  # the one that is being handled
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(message, file=sys.stderr)
    sys.exit(1)
