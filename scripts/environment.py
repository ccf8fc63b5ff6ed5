"""Make ``.venv``: the pinned packages, shared between checkouts, with this checkout's ``inlay`` on top.

The packages (gigabytes, minutes) live outside the tree, in ``$XDG_CACHE_HOME/inlay/env-<key>``. The key is a hash of
all that decides what is in there: constraints.txt, the requirements in pyproject.toml, the Python. Checkouts with the
same key share them. ``.venv`` (kilobytes, seconds) sees them through a ``.pth`` file and holds an editable install of
this checkout alone, so two checkouts cannot import each other's code.

The incumbent (``peft``) is installed apart from the others, in ``incumbent-<key>``, which ``.venv`` sees too. A second
environment, ``.venv-dropin`` (kept outside the tree too, linked from it), sees everything but that, and has this
checkout's drop-in, the distribution in ``dropin/`` that bears the same name.

An environment counts as complete when its stamp is there. The stamp is written last and one lock is held while
anything is built, so a set-up that was killed is started anew and one that runs beside another waits for it.

Needs nothing but the standard library. Prints nothing when there is nothing to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
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
DROPIN = TREE / "dropin"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"
STAMP = "inlay-complete"
INCUMBENT = re.compile(r"peft\b")  # the requirement that must not be seen where the drop-in is


def requirements(pyproject: dict[str, Any]) -> list[str]:
    """What inlay, all its extras and the development group ask for."""
    project = pyproject["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return sorted({*project["dependencies"], *extras, *pyproject["dependency-groups"]["dev"]})


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_finished(env: Path, key: str) -> bool:
    """Whether ``env`` was finished under ``key``."""
    stamp = env / STAMP
    return stamp.is_file() and stamp.read_text() == key


def is_complete(env: Path, key: str) -> bool:
    """Whether ``env`` was finished under ``key`` and its interpreter is still there."""
    return is_finished(env, key) and (env / "bin" / "python").exists()


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


def build_incumbent(folder: Path, key: str, shared: Path, wanted: list[str]) -> None:
    """A folder with the incumbent alone: what it needs is in ``shared``."""
    shutil.rmtree(folder, ignore_errors=True)
    constraint = ("--constraint", str(CONSTRAINTS))
    pip(shared / "bin" / "python", "install", "--no-deps", *constraint, "--target", str(folder), *wanted)
    finish(folder, key)


def build_tree(env: Path, key: str, seen: list[str], trees: list[Path]) -> None:
    """A small environment that sees the folders of packages ``seen`` and has ``trees`` installed in place."""
    python = bare_venv(env, with_pip=False)
    links = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in seen)
    (Path(site_packages(python)) / "_shared.pth").write_text(links)
    for tree in trees:
        pip(python, "install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", str(tree))
    finish(env, key)


def link(at: Path, target: Path) -> None:
    """A link ``at`` in the tree to an environment outside of it."""
    if at.is_symlink() or at.is_file():
        at.unlink()
    shutil.rmtree(at, ignore_errors=True)
    at.symlink_to(target, target_is_directory=True)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (make takes whichever Python it finds)
        found = f"{sys.executable} is {platform.python_version()}"
        sys.exit(f"inlay needs Python 3.11 or newer; {found}. Name another one: make PYTHON=/path/to/python3.11")
    import tomllib  # absent before 3.11, where the line above is what should be read

    text = PYPROJECT.read_text()
    wanted = requirements(tomllib.loads(text))
    incumbent = [line for line in wanted if INCUMBENT.match(line)]
    others = [line for line in wanted if line not in incumbent]
    python = (sys.implementation.name, platform.python_version(), sys.base_prefix, sys.platform, platform.machine())
    key = digest(CONSTRAINTS.read_text(), *python, *others, "apart:", *incumbent)
    tree_key = digest(key, str(CACHE), str(TREE), text, (DROPIN / "pyproject.toml").read_text())
    shared, apart, tree = CACHE / f"env-{key}", CACHE / f"incumbent-{key}", TREE / ".venv"
    dropin, linked = CACHE / f"dropin-{digest(str(TREE))}", TREE / ".venv-dropin"

    def standing() -> bool:
        both = is_complete(shared, key) and is_finished(apart, key)
        return both and is_complete(tree, tree_key) and is_complete(dropin, tree_key) and linked.is_symlink()

    if standing():
        return
    with locked(CACHE / f"env-{key}.lock"):
        if not is_complete(shared, key):
            build_shared(shared, key, others)
        if not is_finished(apart, key):
            build_incumbent(apart, key, shared, incumbent)
        packages = site_packages(shared / "bin" / "python")
        if not is_complete(tree, tree_key):
            build_tree(tree, tree_key, [packages, str(apart)], [TREE])
        if not is_complete(dropin, tree_key):
            build_tree(dropin, tree_key, [packages], [TREE, DROPIN])
        link(linked, dropin)


if __name__ == "__main__":
    main()
