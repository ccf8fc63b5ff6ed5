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
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    from inlay.errors import PeftError

    try:
        from inlay.cli.app import run

        run(arguments, begun)
    except PeftError as error:
        _fail(f"{type(error).__name__}: {error}", debug)
    except ModuleNotFoundError as error:
        if (error.name or "inlay").partition(".")[0] == "inlay":
            raise
        _fail(f"this command needs {error.name}, which is not installed; pip install 'inlay[train]'", debug)


def _fail(message: str, debug: bool) -> None:
    if debug:
        raise  # the one that is being handled
    if os.environ.get("RANK", "0") == "0":  # every process of a distributed run finds the same
        print(message, file=sys.stderr)
    sys.exit(1)
