"""The only module that opens files: an adapter's two files, read with nothing believed unchecked, written as one.

A directory may come from anyone: see :func:`open_weights` for what is checked before anything is allocated or run.

New weights under an old config compute something that nobody trained, and two files cannot be replaced at one instant.
So the weights carry the SHA-256 of the config's exact bytes, and files are replaced in such an order
(:func:`_write_files`) that a kill at any moment leaves the old pair, the new one, or one that :func:`read_pair`
refuses. Weights without a hash, as the PEFT library writes them, are accepted.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import pickletools
import stat
import struct
import sys
import time
import warnings
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from inlay.errors import (
    ConfigError,
    CorruptFileError,
    FileError,
    MissingFileError,
    PeftWarning,
    TornPairError,
    UnreadableError,
    UnwritableError,
)

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
PAIR_KEY = "inlay_config_sha256"

MAX_CONFIG_BYTES = 10 * 2**20
MAX_CONFIG_DEPTH = 32
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 32
MAX_METADATA_BYTES = 2**16 - 1  # what the comment of a zip archive holds
_STALE_SECONDS = 3600.0
_PAIR_TRIES = 3

# safetensors sorts tensors by descending dtype, in this order of its own, so that every one of them is aligned.
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}

# Everything a pickle of tensors needs to name. torch's own weights_only list is longer: it lets a pickle ask for a
# bytearray or a Tensor of any size.
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double", "ComplexFloat")
_PICKLE_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch.storage UntypedStorage",
        "torch Size",
        *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
        *(str(dtype).replace(".", " ") for dtype in _DTYPE_NAMES),
        *(f"torch {kind}Storage" for kind in _STORAGES),
    }
)

_Content = bytes | Callable[[BinaryIO], object]


class TensorInfo(NamedTuple):
    """What a file says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Pair(NamedTuple):
    """An adapter's two files, known to be of one save."""

    config: dict[str, object]
    weights: Weights


# --- reading ---------------------------------------------------------------------------------------------------------


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"'{path}' {what}. Nothing was loaded; fetch the adapter again or save it again.")


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[tuple[io.FileIO, int]]:
    """An open regular file and its size; anything else is refused without waiting on it."""
    try:
        # Asked twice: opening a device can have effects of its own, and between the questions the path may change.
        _check_regular(path, os.stat(path))
        file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        below = path.parent.glob(f"*/{path.name}") if os.path.isdir(path.parent) else ()
        inside = sorted(found.parent.name for found in below)
        told = f" Folders in it have one: {', '.join(inside[:9])}." if inside else ""
        raise MissingFileError(f"Can't find '{path.name}' at '{path.parent}'.{told}") from error
    except PermissionError as error:
        raise UnreadableError(
            f"'{path}' cannot be read ({error.strerror}). Nothing was loaded; check who may read it."
        ) from error
    except OSError as error:
        raise _corrupt(path, f"cannot be read ({error.strerror})") from error
    with file:
        found = os.fstat(file.fileno())
        _check_regular(path, found)
        yield file, found.st_size


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        what = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise _corrupt(path, f"is {what} where a regular file is expected")


def _read_into(file: io.FileIO, into: memoryview, path: Path) -> None:
    while (n := file.readinto(into)) < len(into):
        into = into[n:]
        if not n:
            raise _corrupt(path, f"ends {len(into):,} bytes early: it is truncated")


def _read_bytes(file: io.FileIO, n: int, path: Path) -> bytes:
    raw = bytearray(n)
    _read_into(file, memoryview(raw), path)
    return bytes(raw)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it; the caller keeps the tensor alive meanwhile."""
    raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {_short(max(counts, key=counts.__getitem__))} occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_short(text)} is not finite")
    return value


def _parse_json(raw: bytes, path: Path, what: str = "") -> dict[str, object]:
    """One JSON object of unique keys and finite numbers, or an error that says what else it is."""
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise _corrupt(path, f"{what}is nested too deeply") from error
    except ValueError as error:
        raise _corrupt(path, f"{what}cannot be read as JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise _corrupt(path, f"{what}is a JSON {type(found).__name__} where an object is expected")
    return found


def _depth(value: object) -> int:
    """How deep lists and objects are nested. Not recursive, since the input may have been made for that."""
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _short(text: str) -> str:
    """A name from a file as it may be printed: escaped, and not longer than a line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _read_json(path: Path) -> tuple[bytes, dict[str, object]]:
    """The bytes of a small file, and the object that they say."""
    with _open_regular(path) as (file, size):
        if size > MAX_CONFIG_BYTES:
            raise _corrupt(path, f"has {size:,} bytes, more than the limit of {MAX_CONFIG_BYTES:,}")
        raw = _read_bytes(file, size, path)
    found = _parse_json(raw, path)
    if (depth := _depth(found)) > MAX_CONFIG_DEPTH:
        raise _corrupt(path, f"is nested {depth} deep, more than the limit of {MAX_CONFIG_DEPTH}")
    return raw, found


def read_json(path: str | Path) -> dict[str, object]:
    """One JSON object from a file of any name.

    Raises:
        MissingFileError: There is no such file.
        CorruptFileError: Not a regular file, too large, nested too deeply, or no JSON object of unique keys and finite
            numbers.
    """
    return _read_json(Path(path))[1]


def read_config(directory: str | Path) -> dict[str, object]:
    """``adapter_config.json`` as plain JSON values; no field is looked at here. Raises what :func:`read_json` does."""
    return read_json(Path(directory) / CONFIG_NAME)


class Weights(contextlib.AbstractContextManager["Weights"]):
    """An open weights file: what it holds is known and checked, and nothing of it is read until :meth:`read`.

    The file stays open, so that what is read is what was checked even if the path is replaced meanwhile; it closes
    with :meth:`close`, with ``with``, or with the object. Raises what :func:`open_weights` does.

    Attributes:
        path (`Path`): The file; a pickle if it is called ``adapter_model.bin``.
        header (`dict[str, TensorInfo]`): Name, dtype and shape of every tensor, in the file's order.
        metadata (`dict[str, str]`): The strings stored beside the tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        read = _open_pickle if path.suffix in _PICKLE_SUFFIXES else _open_safetensors
        with contextlib.ExitStack() as opened:
            file, size = opened.enter_context(_open_regular(path))
            self.header, self.metadata, self._tensors = read(path, file, size)
            self._finalizer = weakref.finalize(self, opened.pop_all().close)

    def read(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors, writable and independent of the file; a `CorruptFileError` where that has changed since."""
        tensors = dict(self._tensors())
        return tensors if str(device) == "cpu" else {key: t.to(device) for key, t in tensors.items()}

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) one by one, for files too large to hold."""
        return self._tensors()

    def close(self) -> None:
        """Closes the file; ``header`` and ``metadata`` stay."""
        self._finalizer()

    def __exit__(self, *exc: object) -> None:
        self.close()


_Opened = tuple[dict[str, TensorInfo], dict[str, str], Callable[[], Iterator[tuple[str, Tensor]]]]


def _open_safetensors(path: Path, file: io.FileIO, size: int) -> _Opened:
    length = int.from_bytes(_read_bytes(file, 8, path), "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(path, f"claims a header of {length:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}")
    start = 8 + length
    if start > size:
        raise _corrupt(path, f"is truncated: it claims a header of {length:,} bytes and has {size:,} in all")
    header, metadata = _parse_header(_read_bytes(file, length, path), size - start, path)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        file.seek(start)
        for key, info in header.items():
            # Straight from the file into the tensor's own memory: no mapping that a truncation could pull away, no
            # second copy, no storage shared with other tensors.
            tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
            if info.nbytes:
                _read_into(file, _memory(tensor), path)
            yield key, tensor

    return header, metadata, tensors


def _parse_header(raw: bytes, data_bytes: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors that a safetensors header declares, in the order of their data, and the metadata.

    Checked: unique keys, known dtypes, shapes of natural numbers, spans that are as long as dtype and shape say, and
    that follow each other without overlap or hole to the very end of the data.
    """
    if not raw.startswith(b"{"):
        raise _corrupt(path, "has a header that does not begin with '{'")
    found = _parse_json(raw, path, "header: ")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "has metadata that are not strings by name")
    header: dict[str, TensorInfo] = {}
    end = 0
    for start, stop, key, info in sorted(_span(key, entry, path) for key, entry in found.items()):
        if start != end:
            what = "overlaps the one before" if start < end else f"leaves a hole of {start - end:,} bytes before it"
            raise _corrupt(path, f"is malformed: tensor {_short(key)} {what}")
        header[key], end = info, stop
    if end != data_bytes:
        what = "is truncated" if end > data_bytes else "holds bytes that belong to no tensor"
        raise _corrupt(path, f"{what}: the header declares {end:,} bytes of data, the file has {data_bytes:,}")
    return header, metadata


def _span(key: str, entry: object, path: Path) -> tuple[int, int, str, TensorInfo]:
    """Start, end, name and meaning of one declared tensor."""

    def wrong(what: str) -> CorruptFileError:
        return _corrupt(path, f"tensor {_short(key)}: {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected an object of dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise wrong(f"unknown dtype {_short(str(name))}; known: {', '.join(_DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise wrong(f"the shape is not a list of at most {MAX_DIMS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets are not a start and an end")
    start, stop = offsets
    info = TensorInfo(_DTYPES[name], tuple(shape))
    if info.nbytes != stop - start:
        raise wrong(f"{name} of shape {shape} takes {info.nbytes:,} bytes, its span has {stop - start:,}")
    return start, stop, key, info


def _naturals(values: object) -> bool:
    # Each is bounded by itself, since an empty tensor may declare others beside its 0: torch multiplies in 64 bits.
    if not isinstance(values, list):
        return False
    for n in values:  # noqa: SIM110  (a generator would take twice as long, and there may be thousands of tensors)
        if type(n) is not int or not 0 <= n < 2**48:
            return False
    return True


def _open_pickle(path: Path, file: io.FileIO, size: int) -> _Opened:
    """A zip archive of a pickle and one record per storage, as ``torch.save`` writes it."""
    metadata = _check_archive(path, file, size)
    # On the meta device first: shapes and dtypes without their memory.
    found = _load_pickled(path, file, "meta")
    _check_meta(path, found, size)
    header = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        # Tensors that share memory in the file share it here; a safetensors file has none that do.
        for key, tensor in _load_pickled(path, file, "cpu").items():
            yield key, tensor.detach().contiguous()

    return header, metadata, tensors


def _check_archive(path: Path, file: io.FileIO, size: int) -> dict[str, str]:
    """Refuses an archive that unpacks to more than it holds, or whose pickle names more than tensors; its metadata."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # torch.save stores without compression; a compressed record is how a small file becomes a large one.
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            if packed or sum(record.file_size for record in records) > size:
                raise _corrupt(path, "unpacks to more than it holds, which torch.save never writes")
            pickles = [record for record in records if record.filename.endswith("data.pkl")]
            if len(pickles) != 1:
                raise _corrupt(path, f"has {len(pickles)} pickles where one is expected")
            _check_pickle(path, archive.read(pickles[0]))
            return _pickled_metadata(archive.comment)
    except CorruptFileError:
        raise
    except Exception as error:  # zipfile raises whatever the bytes provoke
        raise _only_tensors(path, f"it is not a zip archive as torch.save writes ({error})") from error


def _pickled_metadata(comment: bytes) -> dict[str, str]:
    """The metadata that :func:`write_pair` left in the archive's comment; none where anything else stands there."""
    with contextlib.suppress(ValueError, AttributeError):
        return {key: value for key, value in json.loads(comment).items() if isinstance(value, str)}
    return {}


def _check_pickle(path: Path, raw: bytes) -> None:
    """Reads the pickle's program without running it, and refuses any global that tensors do not need."""
    for opcode, arg, _ in pickletools.genops(raw):
        named = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX")
        if named and not (opcode.name == "GLOBAL" and arg in _PICKLE_GLOBALS):
            raise _only_tensors(path, f"its pickle asks for {_short(str(arg or opcode.name))}")


def _only_tensors(path: Path, why: str) -> CorruptFileError:
    return _corrupt(path, f"is refused: only a dictionary of tensors is taken, and {why}; nothing of it was executed")


def _load_pickled(path: Path, file: io.FileIO, device: str) -> dict[str, Tensor]:
    file.seek(0)
    buffered = io.BufferedReader(file)  # a bare file returns at most 2 GiB at a time, and torch asks once
    try:
        found = torch.load(buffered, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes provoke
        raise _only_tensors(path, f"it cannot be read as one ({error})") from error
    finally:
        buffered.detach()
    if not isinstance(found, dict):
        raise _only_tensors(path, f"it holds a {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or type(value) not in (Tensor, torch.nn.Parameter):
            raise _only_tensors(path, f"it holds {_short(str(key))}: {type(value).__name__}")
    return found


def _check_meta(path: Path, found: dict[str, Tensor], size: int) -> None:
    """Refuses tensors that would take more memory than the file has bytes."""
    storages: dict[int, int] = {}
    copied = 0
    for key, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPE_NAMES:
            raise _only_tensors(path, f"{_short(key)} is a {tensor.layout} tensor of {tensor.dtype}")
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        copied += 0 if tensor.is_contiguous() else tensor.nbytes
    if sum(storages.values()) > size or copied > size:
        raise _corrupt(path, f"claims tensors of more bytes than the file's {size:,}")


def open_weights(directory: str | Path) -> Weights:
    """``adapter_model.safetensors`` of a directory, else ``adapter_model.bin``: opened and checked, not read.

    Raises:
        MissingFileError: Neither is there.
        CorruptFileError: Truncated, malformed, over a limit, not a regular file, or a pickle of more than tensors;
            nothing was allocated and nothing executed.
    """
    directory = Path(directory)
    # The first name again at the end: a writer beside us may just have replaced the second by it.
    for name in (SAFETENSORS_NAME, PICKLE_NAME, SAFETENSORS_NAME):
        with contextlib.suppress(MissingFileError):
            return Weights(directory / name)
    raise MissingFileError(
        f"Can't find '{SAFETENSORS_NAME}' or '{PICKLE_NAME}' at '{directory}'; an adapter's weights are in one."
    )


def read_pair(directory: str | Path, strict: bool = True) -> Pair:
    """Config and opened weights of one save; one under way in another process is waited for, a moment long.

    Raises:
        TornPairError: The two files are of different saves; where not ``strict``, a warning instead.
        MissingFileError, CorruptFileError: One of them is not there, or cannot be used.
    """
    directory = Path(directory)
    for left in reversed(range(_PAIR_TRIES)):
        raw, config = _read_json(directory / CONFIG_NAME)
        weights = open_weights(directory)
        wanted, found = weights.metadata.get(PAIR_KEY), hashlib.sha256(raw).hexdigest()
        if wanted is None or wanted == found:
            return Pair(config, weights)
        if left or strict:
            weights.close()
            time.sleep(0.02)
    text = (
        f"The config and the weights at '{directory}' are not of one save: the weights were saved with a config of "
        f"SHA-256 {_short(str(wanted))}, '{CONFIG_NAME}' has '{found}'. A save was cut short, or one file was "
        "copied or edited alone. Save or fetch the adapter again; if the config was edited on purpose, call "
        "inlay.formats.files.reseal(directory)."
    )
    if strict:
        raise TornPairError(text)
    warnings.warn(text, PeftWarning, stacklevel=5)
    return Pair(config, weights)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_pair(
    directory: str | Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Writes an adapter's two files so that they cannot tear; the same values give the same bytes.

    Nothing is replaced before all of it is on the disk, and a kill leaves the old pair, the new one, or one that
    :func:`read_pair` refuses. Views and tensors that share memory are written in full, each by itself.

    Args:
        directory (`str` or `Path`): Where to; made if it is not there.
        config (`dict[str, object]`): JSON values, and sets, which become sorted lists.
        tensors (`dict[str, Tensor]`): By name, on any device.
        metadata (`dict[str, str]`, *optional*): Strings to keep beside the tensors, with the config's hash.
        safe_serialization (`bool`, *optional*, defaults to `True`): ``adapter_model.safetensors``; otherwise
            ``adapter_model.bin``, a pickle. The other one, which a reader could take for the adapter, is removed.

    Raises:
        UnwritableError: The directory is a file or cannot be written, or a tensor has no values to write.
        ConfigError: The config holds what JSON does not have.
    """
    for key, tensor in tensors.items():
        if _is_distributed(tensor):
            raise UnwritableError(
                f"tensor '{key}' is in parts on several processes: gather it on all of them, as "
                "get_model_state_dict(..., full_state_dict=True) does, and save what that gives (state_dict=...)."
            )
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in _DTYPE_NAMES:
            what = "on the meta device" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
            raise UnwritableError(f"tensor '{key}' is {what}: it has no values that the file could hold.")
    raw = _config_bytes(config)
    name = SAFETENSORS_NAME if safe_serialization else PICKLE_NAME
    stamped = {**(metadata or {}), "format": "pt", PAIR_KEY: hashlib.sha256(raw).hexdigest()}
    _write_files(Path(directory), {name: partial(_WRITERS[name], tensors, stamped), CONFIG_NAME: raw})


def _is_distributed(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def reseal(directory: str | Path) -> None:
    """Declares the config on disk to be the one that the weights beside it belong to, after an edit made on purpose.

    Raises:
        FileError: A file cannot be read, or the directory cannot be written.
    """
    directory = Path(directory)
    raw, _ = _read_json(directory / CONFIG_NAME)
    with open_weights(directory) as weights:
        tensors, stamped = weights.read(), {**weights.metadata, PAIR_KEY: hashlib.sha256(raw).hexdigest()}
    name = weights.path.name
    _write_files(directory, {name: partial(_WRITERS[name], tensors, stamped)})


def write_config(directory: str | Path, config: Mapping[str, object]) -> None:
    """Writes ``adapter_config.json`` alone, as :func:`write_pair` does.

    Weights that lie beside it are no longer its own until :func:`reseal`.
    """
    _write_files(Path(directory), {CONFIG_NAME: _config_bytes(config)})


def save_text(path: str | Path, text: str) -> None:
    """Writes a text file such as ``README.md`` whole or not at all; `UnwritableError` where it cannot be."""
    path = Path(path)
    _write_files(path.parent, {path.name: text.encode()})


def _write_files(directory: Path, contents: Mapping[str, _Content]) -> None:
    """Writes every file in full beside its place, then puts them in place in the order given: weights, config.

    Weights first: they carry the hash of the new config, so that until the config follows the pair is refused. The
    other way round, weights that carry no hash would be accepted under a config that is not theirs. A reader prefers
    safetensors to a pickle. So a stale pickle goes last, when nobody looks at it any more, and a stale safetensors
    file goes once the pickle that replaces it is in place and before the config that would not be its own. Each step
    reaches the disk before the next begins: otherwise a power cut could keep the later one alone.
    """
    staged = {name: directory / f".{name}.{os.urandom(8).hex()}.tmp" for name in contents}
    made = False
    try:
        made = _prepare(directory, contents)
        for name, content in contents.items():
            # Not tempfile: that makes files which only their owner can read, and the mode survives the move.
            with open(staged[name], "x+b") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():
            os.replace(path, directory / name)
            made = False
            _sync_directory(directory)
            if name == PICKLE_NAME:
                _remove(directory / SAFETENSORS_NAME)
        if SAFETENSORS_NAME in staged:
            _remove(directory / PICKLE_NAME)
    except FileError:
        raise
    except OSError as error:
        raise UnwritableError(f"'{directory}' cannot be written: {error.strerror or error}.") from error
    finally:
        for path in staged.values():
            with contextlib.suppress(OSError):
                os.unlink(path)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _prepare(directory: Path, names: Iterable[str]) -> bool:
    """Sweeps out what killed writers left: a living one is never silent for an hour. Whether it made the directory."""
    made = not os.path.lexists(directory)
    if not (made or directory.is_dir()):
        raise UnwritableError(f"{directory} should be a directory, not a file: name another place to save in.")
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = directory / name
        if os.path.lexists(path) and stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
            raise UnwritableError(f"'{path}' is not a regular file and will not be replaced; move it away.")
        for left in directory.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                    left.unlink()
    return made


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":
        fd = os.open(directory, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems sync no directories
            os.fsync(fd)
        os.close(fd)


def _config_bytes(config: Mapping[str, object]) -> bytes:
    """A config as it is written: the same values give the same bytes, whatever the order of its sets and keys."""
    try:
        raw = json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False, default=_sorted_set).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the config cannot be written as JSON: {error}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"the config takes {len(raw):,} bytes, more than the limit of {MAX_CONFIG_BYTES:,}")
    return raw


def _sorted_set(value: object) -> list[object]:
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda item: (type(item).__name__, item))
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON does not have")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _write_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: BinaryIO) -> None:
    """What the safetensors library writes, byte by byte, except that it leaves the order of the metadata to chance."""
    order = sorted(tensors, key=lambda key: (-_DTYPE_RANK[tensors[key].dtype], key))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for key in order:
        tensor, start = tensors[key], end
        end += tensor.nbytes
        dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(struct.pack("<Q", len(raw)) + raw)
    for key in order:
        values = _plain(tensors[key])
        if values.nbytes:
            file.write(_memory(values))


def _write_pickle(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: BinaryIO) -> None:
    """A zip archive by ``torch.save`` with the metadata as its comment, which torch and the PEFT library pass over."""
    # Copies, since torch writes the whole storage that a view is of, and shared ones once.
    torch.save({key: _plain(tensors[key]).clone() for key in sorted(tensors)}, file)
    comment = json.dumps(dict(metadata), sort_keys=True).encode()
    if len(comment) > MAX_METADATA_BYTES:
        raise UnwritableError(f"metadata of {len(comment):,} bytes; a '.bin' holds at most {MAX_METADATA_BYTES:,}.")
    # An archive ends with the length of its comment, 0 so far.
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", len(comment)) + comment)


_WRITERS = {SAFETENSORS_NAME: _write_safetensors, PICKLE_NAME: _write_pickle}
