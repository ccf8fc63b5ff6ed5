"""Adapters on the Hugging Face hub: exactly the two files of an adapter down, a saved directory up.

``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and the cache are the hub library's own and are honoured by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from inlay.errors import CorruptFileError, MissingFileError, UnwritableError
from inlay.formats.files import CONFIG_NAME, PICKLE_NAME, SAFETENSORS_NAME

# What a save leaves when it is killed, and what an operating system or an editor adds.
_NOT_UPLOADED = [".*", "**/.*", "__pycache__/*"]

_Failures = (OSError, ValueError, EntryNotFoundError, HfHubHTTPError)


def fetch(
    model_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    **client: Any,
) -> Path:
    """The local directory of an adapter, downloaded if ``model_id`` is no directory here; its files are not read yet.

    From the hub come ``adapter_config.json`` and ``adapter_model.safetensors``, or ``adapter_model.bin`` where the
    first is not there, both from one commit, and no other file. A directory that exists here is never looked for
    elsewhere.

    Args:
        model_id (`str` or `Path`): A directory, or a repository as ``owner/name``.
        subfolder (`str`, *optional*): Where inside of it.
        revision (`str`, *optional*): Branch, tag or commit.
        weights (`bool`, *optional*, defaults to `True`): Fetch the weights too, not the config alone.
        client: ``token``, ``cache_dir``, ``force_download``, ... as the hub library takes them.

    Raises:
        MissingFileError: There is no such adapter or it cannot be had; the hub library's error is its cause.
        CorruptFileError: ``subfolder`` leads out of the directory.
    """
    folder = _inside(subfolder)
    if os.path.isdir(model_id):  # where Path.is_dir raises for what is no path, such as a name too long
        return Path(model_id) / folder
    inside = folder.as_posix() if folder.parts else None
    download = partial(hf_hub_download, str(model_id), subfolder=inside, **client)
    where = f"{model_id}/{folder}" if folder.parts else model_id
    with _found(f"'{CONFIG_NAME}' at '{where}'"):
        directory = Path(download(CONFIG_NAME, revision=revision)).parent
    if weights:
        # In the cache a directory is named after the commit: asking for that commit keeps the pair together when
        # somebody uploads between our two requests.
        commit = directory.parts[-len(folder.parts) - 1]
        with _found(f"'{SAFETENSORS_NAME}' or '{PICKLE_NAME}' at '{where}'"):
            try:
                download(SAFETENSORS_NAME, revision=commit)
            except EntryNotFoundError:
                download(PICKLE_NAME, revision=commit)
    return directory


def _inside(subfolder: str | None) -> PurePosixPath:
    """The subfolder as a relative path that stays below the directory it is joined to."""
    text = subfolder or ""
    folder = PurePosixPath(text)
    windows = PureWindowsPath(text)
    # Both notations: "..\\x" and "C:x" are plain names here and ways out on Windows.
    if ".." in (*folder.parts, *windows.parts) or folder.is_absolute() or windows.anchor or "\0" in text:
        told = f"subfolder {subfolder!r} leads out of the adapter's directory"
        raise CorruptFileError(f"{told}; give a path below it, such as 'last'.")
    return folder


@contextmanager
def _found(what: str) -> Iterator[None]:
    """Makes a `MissingFileError` of what the hub library raises inside."""
    try:
        yield
    except _Failures as error:
        raise MissingFileError(
            f"Can't find {what}: no such directory here, and the hub gave none (its error is above). Check the name, "
            "the revision, the token and HF_HUB_OFFLINE."
        ) from error


def push(
    directory: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> CommitInfo:
    """Uploads a saved adapter in one commit; the repository and the branch are made if they are not there.

    Args:
        directory (`str` or `Path`): As ``save_pretrained`` left it; hidden files stay behind.
        repo_id (`str`): ``owner/name``.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`): First line of the commit.
        private (`bool`, *optional*): For a repository that is made; the hub's default otherwise.
        revision (`str`, *optional*): The branch to commit to.
        create_pr (`bool`, *optional*, defaults to `False`): Propose the commit instead of making it.
        token, endpoint: As the hub library takes them.

    Raises:
        MissingFileError: The directory holds no adapter.
        UnwritableError: The hub refused; its error is the cause.
    """
    directory = Path(directory)
    if not any(directory.rglob(CONFIG_NAME)):
        told = f"Can't find '{CONFIG_NAME}' at '{directory}'"
        raise MissingFileError(f"{told}; save the adapter there before pushing it.")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message or "Upload adapter",
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=_NOT_UPLOADED,
        )
    except _Failures as error:
        raise UnwritableError(f"'{repo_id}' on the hub cannot be written: {error}") from error


def cached(model_id: str, filename: str) -> Path | None:
    """A file of a repository where an earlier download left it; nothing is fetched."""
    try:
        found = try_to_load_from_cache(model_id, filename)
    except HFValidationError:  # a local path, or no id at all
        return None
    return Path(found) if isinstance(found, str) else None
