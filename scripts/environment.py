"""Make ``.venv``: the pinned packages, shared between checkouts, with this checkout's ``inlay`` on top.

The packages (gigabytes, minutes) live outside the tree, in ``$XDG_CACHE_HOME/inlay/env-<key>``. The key is a hash of
all that decides what is in there: constraints.txt, the requirements in pyproject.toml, the Python. Checkouts with the
same key share them. ``.venv`` (kilobytes, seconds) sees them through a ``.pth`` file and holds an editable install of
this checkout alone, so two checkouts cannot import each other's code.

An environment counts as complete when its stamp is there. The stamp is written last and one lock is held while
anything is built, so a set-up that was killed is started anew and one that runs beside another waits for it.

Needs nothing but the standard library. Prints nothing when there is nothing to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
CONSTRAINTS = TREE / "constraints.txt"
PYPROJECT = TREE / "pyproject.toml"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"
STAMP = "inlay-complete"


def requirements(pyproject: dict[str, Any]) -> list[str]:
    """What inlay, all its extras and the development group ask for."""
    project = pyproject["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return sorted({*project["dependencies"], *extras, *pyproject["dependency-groups"]["dev"]})


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_complete(env: Path, key: str) -> bool:
    """Whether ``env`` was finished under ``key`` and its interpreter is still there."""
    stamp = env / STAMP
    return stamp.is_file() and stamp.read_text() == key and (env / "bin" / "python").exists()


def finish(env: Path, key: str) -> None:
    part = env / f"{STAMP}.part"
    part.write_text(key)
    part.replace(env / STAMP)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` alone. The system releases it when this process and its pip have ended, however they end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        # A pip that outlives a killed set-up holds the lock on: it is waited for, and never written beside.
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of the same environment...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def bare_venv(env: Path, *, with_pip: bool) -> Path:
    """A fresh environment at ``env``; returns its interpreter."""
    if env.is_symlink() or env.is_file():
        env.unlink()
    shutil.rmtree(env, ignore_errors=True)
    try:
        venv.EnvBuilder(with_pip=with_pip, symlinks=True).create(env)
    except subprocess.CalledProcessError:
        sys.exit("This Python cannot install pip into an environment. On Debian and Ubuntu: apt install python3-venv")
    return env / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # errors only
    command = [str(python), "-m", "pip", *arguments, "--disable-pip-version-check", *quiet]
    if code := subprocess.run(command, cwd=TREE, close_fds=False).returncode:
        sys.exit(f"pip stopped with {code}: see above. Run the same make command again to start anew.")


def site_packages(python: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def build_shared(env: Path, key: str, wanted: list[str]) -> None:
    print(f"Installing the pinned packages into {env} (once, some minutes)...", flush=True)
    python = bare_venv(env, with_pip=True)
    pip(python, "install", "--constraint", str(CONSTRAINTS), *wanted)
    finish(env, key)


def build_tree(env: Path, key: str, shared: Path) -> None:
    """``.venv``: an empty environment that sees ``shared`` and has this checkout installed in place."""
    python = bare_venv(env, with_pip=False)
    link = f"import site; site.addsitedir({site_packages(shared / 'bin' / 'python')!r})\n"
    (Path(site_packages(python)) / "_shared.pth").write_text(link)
    pip(python, "install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", str(TREE))
    finish(env, key)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (make takes whichever Python it finds)
        found = f"{sys.executable} is {platform.python_version()}"
        sys.exit(f"inlay needs Python 3.11 or newer; {found}. Name another one: make PYTHON=/path/to/python3.11")
    import tomllib  # absent before 3.11, where the line above is what should be read

    text = PYPROJECT.read_text()
    wanted = requirements(tomllib.loads(text))
    python = (sys.implementation.name, platform.python_version(), sys.base_prefix, sys.platform, platform.machine())
    shared_key = digest(CONSTRAINTS.read_text(), *python, *wanted)
    tree_key = digest(shared_key, str(CACHE), str(TREE), text)
    shared, tree = CACHE / f"env-{shared_key}", TREE / ".venv"
    if is_complete(shared, shared_key) and is_complete(tree, tree_key):
        return
    with locked(CACHE / f"env-{shared_key}.lock"):
        if not is_complete(shared, shared_key):
            build_shared(shared, shared_key, wanted)
        if not is_complete(tree, tree_key):
            build_tree(tree, tree_key, shared)


if __name__ == "__main__":
    main()
