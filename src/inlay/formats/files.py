"""The only module that opens files: an adapter's two files, read with nothing believed unchecked, written as one.

Reading. A directory may come from anyone. A path is opened only when it is a regular file; the header of
``adapter_model.safetensors`` is parsed and checked in full (see :func:`parse_header`) before a byte is allocated for a
tensor; ``adapter_model.bin`` may name nothing but what tensors are made of, and is then read with
``weights_only=True``.

Writing. ``adapter_config.json`` and the weights are a pair: new weights under an old config compute something that
nobody trained. Two files cannot be replaced at one instant, so the weights carry the SHA-256 of the config they were
saved with, and the order of replacement (:func:`_swap`) is such that a kill at any moment leaves the old pair, the new
one, or one whose hash does not match and that :func:`check_pair` refuses. Files without a hash, as the PEFT library
writes, are accepted.

The hash is taken over the exact bytes of ``adapter_config.json``; an edit by hand is followed by :func:`reseal`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import pickletools
import secrets
import stat
import struct
import time
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from inlay.errors import ConfigError, CorruptFileError, FileError, MissingFileError, TornPairError, UnwritableError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PAIR_KEY = "inlay_config_sha256"

MAX_CONFIG_BYTES = 10 * 2**20
MAX_CONFIG_DEPTH = 32
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 2**20
MAX_DIMS = 32
MAX_METADATA_BYTES = 2**16 - 1  # what the comment of a zip archive holds

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
_PICKLE_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch.storage UntypedStorage",
        "torch Size",
        *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
        *(f"torch {dtype}".replace("torch torch.", "torch ") for dtype in _DTYPE_NAMES),
        *(
            f"torch {kind}Storage"
            for kind in (
                "Bool",
                "Byte",
                "Char",
                "Short",
                "Int",
                "Long",
                "Half",
                "BFloat16",
                "Float",
                "Double",
                "ComplexFloat",
            )
        ),
    }
)

_AGAIN = "Nothing was loaded; fetch the adapter again or save it again"
_STALE_SECONDS = 3600.0
_PAIR_TRIES = 3


Writer = Callable[[BinaryIO], object]


class TensorInfo(NamedTuple):
    """What a file says about one tensor: its ``dtype`` and ``shape``."""

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


# --- opening ---------------------------------------------------------------------------------------------------------


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"'{path}' {what}. {_AGAIN}.")


def _open_regular(path: Path, limit: int | None = None) -> tuple[io.FileIO, int]:
    """An open regular file and its size; anything else is refused without waiting on it."""
    try:
        # Asked twice: opening a device can have effects of its own, and between the questions the path may change.
        _check_regular(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise MissingFileError(f"Can't find '{path.name}' at '{path.parent}'.") from error
    except OSError as error:
        raise _corrupt(path, f"cannot be read ({error.strerror})") from error
    file = os.fdopen(fd, "rb", buffering=0)
    try:
        found = os.fstat(fd)
        _check_regular(path, found)
        if limit is not None and found.st_size > limit:
            raise _corrupt(path, f"has {found.st_size:,} bytes, more than the limit of {limit:,}")
    except BaseException:
        file.close()
        raise
    return file, found.st_size


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise _corrupt(
            path, f"is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')} where a regular file is expected"
        )


def _read_exactly(file: io.FileIO, into: memoryview, path: Path) -> None:
    while into:
        n = file.readinto(into)
        if not n:
            raise _corrupt(path, f"ended {len(into):,} bytes early: it was cut short while being read")
        into = into[n:]


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it; the caller keeps the tensor alive meanwhile."""
    raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")


# --- JSON ------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_short(twice)} occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_short(text)} is not finite")
    return value


def _parse_json(raw: bytes, path: Path, what: str) -> dict[str, object]:
    """One JSON object of unique keys and finite numbers, or an error that says what else it is."""
    try:
        found: object = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except UnicodeDecodeError as error:
        raise _corrupt(path, f"{what}is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise _corrupt(path, f"{what}is nested too deeply") from error
    except ValueError as error:
        raise _corrupt(path, f"{what}cannot be read as JSON: {error}") from error
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


def _short(text: str, n: int = 80) -> str:
    """A name from a file as it may be printed: escaped, and not longer than a line."""
    return repr(text if len(text) <= n else text[: n - 3] + "...")


# --- the config ------------------------------------------------------------------------------------------------------


def read_config_bytes(directory: str | Path) -> bytes:
    """The bytes of ``adapter_config.json``, over which the pair's hash is taken.

    Args:
        directory (`str` or `Path`): Where the adapter is.

    Raises:
        MissingFileError: There is no such file.
        CorruptFileError: It is not a regular file, or larger than ``MAX_CONFIG_BYTES``.
    """
    path = Path(directory) / CONFIG_NAME
    file, size = _open_regular(path, MAX_CONFIG_BYTES)
    with file:
        raw = bytearray(size)
        _read_exactly(file, memoryview(raw), path)
    return bytes(raw)


def read_config(directory: str | Path) -> dict[str, object]:
    """``adapter_config.json`` as plain JSON values; no field is looked at here.

    Args:
        directory (`str` or `Path`): Where the adapter is.

    Raises:
        MissingFileError: There is no such file; the message starts "Can't find 'adapter_config.json' at".
        CorruptFileError: Not a regular file, too large, not UTF-8, not one JSON object, nested too deeply, a key
            twice, or a number that is not finite.
    """
    return parse_config(read_config_bytes(directory), Path(directory) / CONFIG_NAME)


def read_json(path: str | Path) -> dict[str, object]:
    """One JSON object from a file of any name, read as carefully as a config.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        MissingFileError, CorruptFileError: As for :func:`read_config`.
    """
    path = Path(path)
    file, size = _open_regular(path, MAX_CONFIG_BYTES)
    with file:
        raw = bytearray(size)
        _read_exactly(file, memoryview(raw), path)
    return parse_config(bytes(raw), path)


def parse_config(raw: bytes, path: Path = Path(CONFIG_NAME)) -> dict[str, object]:
    """The bytes of a config as JSON values; ``path`` is for the messages.

    Example:
        >>> parse_config(b'{"r": 8, "target_modules": ["q"]}')
        {'r': 8, 'target_modules': ['q']}
    """
    found = _parse_json(raw, path, "")
    if (depth := _depth(found)) > MAX_CONFIG_DEPTH:
        raise _corrupt(path, f"is nested {depth} deep, more than the limit of {MAX_CONFIG_DEPTH}")
    return found


def config_bytes(config: Mapping[str, object]) -> bytes:
    """A config as it is written: the same values give the same bytes, whatever the order of its sets and keys.

    Raises:
        ConfigError: A value that JSON does not have.

    Example:
        >>> config_bytes({"b": {"y", "x"}, "a": 1}).decode().split()
        ['{', '"a":', '1,', '"b":', '[', '"x",', '"y"', ']', '}']
    """
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False, default=_sorted_set).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the config cannot be written as JSON: {error}") from error


def _sorted_set(value: object) -> list[object]:
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda item: (type(item).__name__, item))
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON does not have")


def config_sha256(raw: bytes) -> str:
    """The hash that weights carry of the config's bytes."""
    return hashlib.sha256(raw).hexdigest()


def check_pair(raw: bytes, metadata: Mapping[str, str], where: str | Path = "") -> None:
    """Refuses weights whose metadata names another config than this one. Weights without the entry are accepted.

    Args:
        raw (`bytes`): ``adapter_config.json`` as it is on disk (:func:`read_config_bytes`).
        metadata (`dict[str, str]`): :attr:`Weights.metadata`.
        where (`str` or `Path`, *optional*): The directory, for the message.

    Raises:
        TornPairError: The hashes differ.
    """
    wanted, found = metadata.get(PAIR_KEY), config_sha256(raw)
    if wanted is not None and wanted != found:
        raise TornPairError(
            f"The config and the weights at '{where}' are not of one save: the weights were saved with a config of "
            f"SHA-256 {_short(wanted[:64])}, '{CONFIG_NAME}' has '{found}'. A save was cut short, or one file was "
            "copied or edited alone. Save or fetch the adapter again; if the config was edited on purpose, call "
            "inlay.formats.files.reseal(directory)."
        )


# --- the weights -----------------------------------------------------------------------------------------------------


class Weights(ABC):
    """An open weights file: what it holds is known and checked, and nothing of it is read until :meth:`read`.

    The file stays open, so that what is read is what was checked even if the path is replaced meanwhile; it closes
    with :meth:`close`, with ``with``, or with the object.

    Attributes:
        path (`Path`): The file.
        header (`dict[str, TensorInfo]`): Name, dtype and shape of every tensor, in the file's order.
        metadata (`dict[str, str]`): The strings stored beside the tensors.
    """

    def __init__(self, path: Path, file: io.FileIO, header: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        self.path, self.header, self.metadata = path, header, metadata
        self._file = file
        self._finalizer = weakref.finalize(self, file.close)

    @abstractmethod
    def read(self, keys: Iterable[str] | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors, writable and independent of the file.

        Args:
            keys (`Iterable[str]`, *optional*): Which ones; all by default.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to put them.

        Raises:
            CorruptFileError: The file was changed since it was opened.
            KeyError: A name that is not in ``header``.
        """

    @cached_property
    def sha(self) -> str:
        """SHA-256 of the whole file, computed when first asked for."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self) -> None:
        """Closes the file; ``header`` and ``metadata`` stay."""
        self._finalizer()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Safetensors(Weights):
    """``adapter_model.safetensors``."""

    def __init__(self, path: Path, file: io.FileIO, size: int) -> None:
        entries, metadata, self._start = _read_header(path, file, size)
        self._offsets = {key: offset for key, (_, offset) in entries.items()}
        super().__init__(path, file, {key: info for key, (info, _) in entries.items()}, metadata)

    def read(self, keys: Iterable[str] | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        tensors = {}
        for key in self.header if keys is None else keys:
            info = self.header[key]
            # Straight from the file into the tensor's own memory: no mapping that a truncation could pull away, no
            # second copy, no storage shared with other tensors.
            tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
            if info.nbytes:
                self._file.seek(self._start + self._offsets[key])
                _read_exactly(self._file, _memory(tensor), self.path)
            tensors[key] = tensor if device == "cpu" else tensor.to(device)
        return tensors


def _read_header(
    path: Path, file: io.FileIO, size: int
) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str], int]:
    """The checked header of an open safetensors file, its metadata, and where its data starts."""
    if size < 8:
        raise _corrupt(path, f"has {size} bytes, too few for the length of a header")
    raw_length = bytearray(8)
    _read_exactly(file, memoryview(raw_length), path)
    length = int.from_bytes(raw_length, "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(path, f"claims a header of {length:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise _corrupt(path, f"is truncated: it claims a header of {length:,} bytes and has {size:,} in all")
    raw = bytearray(length)
    _read_exactly(file, memoryview(raw), path)
    entries, metadata = parse_header(bytes(raw), size - 8 - length, path)
    return entries, metadata, 8 + length


def parse_header(
    raw: bytes, data_bytes: int, path: Path = Path(SAFETENSORS_NAME)
) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """The tensors that a safetensors header declares, with their offsets, and its metadata.

    Checked: the size, unique keys, the number of tensors, known dtypes, shapes of natural numbers, spans that are as
    long as dtype and shape say, and that follow each other without overlap or hole to the very end of the data.

    Args:
        raw (`bytes`): The JSON of the header.
        data_bytes (`int`): How many bytes of the file follow it.
        path (`Path`, *optional*): For the messages.

    Raises:
        CorruptFileError: Any of that does not hold; the message names the tensor.

    Example:
        >>> entries, _ = parse_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8)
        >>> entries["a"]
        (TensorInfo(dtype=torch.float32, shape=(2,)), 0)
    """
    if not raw.startswith(b"{"):
        raise _corrupt(path, "has a header that does not begin with '{'")
    found = _parse_json(raw, path, "header: ")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "has metadata that are not strings by name")
    if len(found) > MAX_TENSORS:
        raise _corrupt(path, f"declares {len(found):,} tensors, more than the limit of {MAX_TENSORS:,}")
    spans = [(*_span(key, entry, path), key) for key, entry in found.items()]
    spans.sort(key=lambda span: span[:2])
    end = 0
    for start, stop, _, key in spans:
        if start != end:
            what = "overlaps the one before" if start < end else f"leaves a hole of {start - end:,} bytes before it"
            raise _corrupt(path, f"is malformed: tensor {_short(key)} {what}")
        end = stop
    if end != data_bytes:
        what = "is truncated" if end > data_bytes else "holds bytes that belong to no tensor"
        raise _corrupt(path, f"{what}: the header declares {end:,} bytes of data, the file has {data_bytes:,}")
    return {key: (info, start) for start, _, info, key in spans}, metadata


def _span(key: str, entry: object, path: Path) -> tuple[int, int, TensorInfo]:
    """Start, end and meaning of one declared tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"tensor {_short(key)}: expected an object of dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise _corrupt(path, f"tensor {_short(key)}: unknown dtype {_short(str(name))}; known: {', '.join(_DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise _corrupt(path, f"tensor {_short(key)}: the shape is not a list of at most {MAX_DIMS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(path, f"tensor {_short(key)}: data_offsets are not a start and an end")
    info = TensorInfo(_DTYPES[name], tuple(shape))
    if info.nbytes != offsets[1] - offsets[0]:
        raise _corrupt(
            path,
            f"tensor {_short(key)}: {name} of shape {shape} takes {info.nbytes:,} bytes, its span has "
            f"{offsets[1] - offsets[0]:,}",
        )
    return offsets[0], offsets[1], info


def _naturals(values: object) -> bool:
    # An empty tensor may still declare sizes beside its 0, so each is bounded by itself: torch multiplies them in 64
    # bits.
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**48 for n in values)


class _Pickled(Weights):
    """``adapter_model.bin``: a zip archive of a pickle and one record per storage, as ``torch.save`` writes it."""

    def __init__(self, path: Path, file: io.FileIO, size: int) -> None:
        metadata = _check_archive(path, file, size)
        # On the meta device first: shapes and dtypes without their memory.
        found = _load_pickled(path, file, "meta")
        _check_meta(path, found, size)
        header = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()}
        super().__init__(path, file, header, metadata)

    def read(self, keys: Iterable[str] | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        # Tensors that share memory in the file share it here; a safetensors file has none that do.
        found = _load_pickled(self.path, self._file, "cpu")
        chosen = self.header if keys is None else keys
        return {key: found[key].detach().contiguous().to(device) for key in chosen}


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
    try:
        found = json.loads(comment)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _check_pickle(path: Path, raw: bytes) -> None:
    """Reads the pickle's program without running it, and refuses any global that tensors do not need."""
    for opcode, arg, _ in pickletools.genops(raw):
        named = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX")
        if named and not (opcode.name == "GLOBAL" and arg in _PICKLE_GLOBALS):
            raise _only_tensors(path, f"its pickle asks for {_short(str(arg or opcode.name))}")


def _only_tensors(path: Path, why: str) -> CorruptFileError:
    return _corrupt(
        path, f"is refused: only a dictionary of tensors is accepted, and {why}; nothing of it was executed"
    )


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

    Args:
        directory (`str` or `Path`): Where the adapter is.

    Raises:
        MissingFileError: Neither is there.
        CorruptFileError: Truncated, malformed, over a limit, not a regular file, or a pickle of more than tensors. The
            message says which; nothing was allocated and nothing executed.
    """
    directory = Path(directory)
    # The first name again at the end: a writer beside us may just have replaced the second by it.
    for name in (SAFETENSORS_NAME, PICKLE_NAME, SAFETENSORS_NAME):
        try:
            file, size = _open_regular(directory / name)
        except MissingFileError:
            continue
        try:
            return (_Pickled if name == PICKLE_NAME else _Safetensors)(directory / name, file, size)
        except BaseException:
            file.close()
            raise
    raise MissingFileError(
        f"Can't find '{SAFETENSORS_NAME}' or '{PICKLE_NAME}' at '{directory}'; an adapter's weights are in one."
    )


def read_pair(directory: str | Path) -> Pair:
    """Config and opened weights of one save.

    A save that is under way in another process is waited for, a moment long.

    Args:
        directory (`str` or `Path`): Where the adapter is.

    Raises:
        TornPairError: The two files are of different saves.
        MissingFileError: One of them is not there.
        CorruptFileError: One of them cannot be used.
    """
    directory = Path(directory)
    for tries_left in reversed(range(_PAIR_TRIES)):
        raw = read_config_bytes(directory)
        weights = open_weights(directory)
        try:
            check_pair(raw, weights.metadata, directory)
            return Pair(parse_config(raw, directory / CONFIG_NAME), weights)
        except BaseException as error:
            weights.close()
            if not (isinstance(error, TornPairError) and tries_left):
                raise
        time.sleep(0.02)
    raise AssertionError("unreachable")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_pair(
    directory: str | Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    safe_serialization: bool = True,
    model_card: str | None = None,
) -> None:
    """Writes an adapter's two files so that they cannot tear; the same values give the same bytes.

    Either everything is written or the directory is as it was. A kill leaves the old pair, the new one, or one that
    :func:`read_pair` refuses. Tensors that are views or share memory are written in full, each by itself.

    Args:
        directory (`str` or `Path`): Where to; made if it is not there.
        config (`dict[str, object]`): JSON values, and sets, which become sorted lists.
        tensors (`dict[str, Tensor]`): By name, on any device.
        metadata (`dict[str, str]`, *optional*): Strings to keep beside the tensors; "format" and the config's hash are
            added.
        safe_serialization (`bool`, *optional*, defaults to `True`): ``adapter_model.safetensors``; otherwise
            ``adapter_model.bin``, a pickle, whose metadata stand in the comment of its zip archive. The other file, if
            there is one, is removed: a reader would take it for the adapter.
        model_card (`str`, *optional*): Text of ``README.md``.

    Raises:
        UnwritableError: The directory is a file or cannot be written, or a tensor has no values to write.
        ConfigError: The config holds what JSON does not have.
    """
    directory = Path(directory)
    _check_values(tensors)
    raw = config_bytes(config)
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"the config takes {len(raw):,} bytes, more than the limit of {MAX_CONFIG_BYTES:,}")
    stamped = {**(metadata or {}), "format": "pt", PAIR_KEY: config_sha256(raw)}
    name = SAFETENSORS_NAME if safe_serialization else PICKLE_NAME
    write = _safetensors_writer(tensors, stamped) if safe_serialization else _pickle_writer(tensors, stamped)
    contents: dict[str, Writer] = {name: write, CONFIG_NAME: lambda file: file.write(raw)}
    if model_card is not None:
        card = model_card.encode()
        contents["README.md"] = lambda file: file.write(card)
    with _staged(directory, contents) as staged:
        _swap(directory, staged)


def write_config(directory: str | Path, config: Mapping[str, object]) -> None:
    """Writes ``adapter_config.json`` alone. Weights that lie beside it are no longer its own until :func:`reseal`.

    Args:
        directory (`str` or `Path`): Where to; made if it is not there.
        config (`dict[str, object]`): JSON values, and sets, which become sorted lists.

    Raises:
        UnwritableError: The directory is a file or cannot be written.
        ConfigError: The config holds what JSON does not have.
    """
    save_text(Path(directory) / CONFIG_NAME, config_bytes(config).decode())


def reseal(directory: str | Path) -> None:
    """Declares the config on disk to be the one that the weights beside it belong to, after an edit made on purpose.

    Args:
        directory (`str` or `Path`): Where the adapter is.

    Raises:
        FileError: As for :func:`read_config` and :func:`open_weights`; or the directory cannot be written.
    """
    directory = Path(directory)
    raw = read_config_bytes(directory)
    parse_config(raw, directory / CONFIG_NAME)
    with open_weights(directory) as weights:
        tensors, stamped = weights.read(), {**weights.metadata, PAIR_KEY: config_sha256(raw)}
    write = (_pickle_writer if weights.path.name == PICKLE_NAME else _safetensors_writer)(tensors, stamped)
    with _staged(directory, {weights.path.name: write}) as staged:
        _swap(directory, staged)


def save_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all, as ``README.md``.

    Args:
        path (`str` or `Path`): The file.
        text (`str`): UTF-8 is written.

    Raises:
        UnwritableError: It cannot be written; what was there is as it was.
    """
    path = Path(path)
    with _staged(path.parent, {path.name: lambda file: file.write(text.encode())}) as staged:
        _swap(path.parent, staged)


def _swap(directory: Path, staged: dict[str, Path]) -> None:
    """Puts staged files in place: the weights, then the config, then what is left.

    Weights first: they carry the hash of the new config, so that until the config follows the pair is refused. The
    other way round, weights that carry no hash would be accepted under a config that is not theirs. A reader prefers
    safetensors to a pickle. So a stale pickle goes last, when nobody looks at it any more, and a stale safetensors
    file goes once the pickle that replaces it is in place and before the config that would not be its own.

    Each step reaches the disk before the next begins: otherwise a power cut could keep the later one alone.
    """
    stale = {SAFETENSORS_NAME: PICKLE_NAME, PICKLE_NAME: SAFETENSORS_NAME}
    weights = next((name for name in stale if name in staged), None)
    if weights is not None:
        _replace(directory, staged, weights)
        if weights == PICKLE_NAME:
            _remove(directory, SAFETENSORS_NAME)
    for name in (CONFIG_NAME, *(name for name in staged if name not in (weights, CONFIG_NAME))):
        if name in staged:
            _replace(directory, staged, name)
    if weights == SAFETENSORS_NAME:
        _remove(directory, PICKLE_NAME)


def _replace(directory: Path, staged: dict[str, Path], name: str) -> None:
    os.replace(staged[name], directory / name)
    _sync_directory(directory)


def _remove(directory: Path, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / name)
        _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no directories
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _staged(directory: Path, contents: Mapping[str, Writer]) -> Iterator[dict[str, Path]]:
    """Every content written in full beside its place; what is not moved from there is removed in the end."""
    staged: dict[str, Path] = {}
    made = None
    try:
        made = _make_directory(directory)
        _check_targets(directory, contents)
        _sweep(directory)
        for name, write in contents.items():
            staged[name] = directory / f".{name}.{secrets.token_hex(8)}.tmp"
            _write_new(staged[name], write)
        yield staged
        made = None
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise UnwritableError(f"'{directory}' cannot be written: {error.strerror or error}.") from error
    finally:
        for path in staged.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if made is not None:
            with contextlib.suppress(OSError):
                made.rmdir()


def _make_directory(directory: Path) -> Path | None:
    """Makes it if needed; returns it if this did."""
    if directory.is_dir():
        return None
    if os.path.lexists(directory):
        raise UnwritableError(f"'{directory}' is a file where a directory is expected; give the path of a directory.")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _check_targets(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        path = directory / name
        if os.path.lexists(path) and stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
            raise UnwritableError(f"'{path}' is not a regular file and will not be replaced; move it away.")


def _sweep(directory: Path) -> None:
    """Removes what killed writers left. A living one touches its file all the time, so an hour's silence is enough."""
    for path in directory.glob(".*.tmp"):
        ours = path.name.startswith((f".{CONFIG_NAME}.", f".{SAFETENSORS_NAME}.", f".{PICKLE_NAME}.", ".README.md."))
        with contextlib.suppress(OSError):
            if ours and time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _write_new(path: Path, write: Writer) -> None:
    # Not tempfile: that makes files which only their owner can read, and the mode survives the move.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with open(fd, "w+b") as file:
        write(file)
        file.flush()
        os.fsync(fd)


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in _DTYPE_NAMES:
            what = "on the meta device" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
            raise UnwritableError(f"tensor '{key}' is {what}: it has no values that the file could hold.")


def _plain(tensor: Tensor) -> Tensor:
    """A tensor's values, contiguous on the CPU."""
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """What the safetensors library writes, byte by byte, except that it leaves the order of the metadata to chance."""

    def write(file: BinaryIO) -> None:
        order = sorted(tensors, key=lambda key: (-_DTYPE_RANK[tensors[key].dtype], key))
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for key in order:
            dtype, start = tensors[key].dtype, end
            end += tensors[key].nbytes
            entry = {"dtype": _DTYPE_NAMES[dtype], "shape": list(tensors[key].shape), "data_offsets": [start, end]}
            header[key] = entry
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        file.write(struct.pack("<Q", len(raw)) + raw)
        for key in order:
            values = _plain(tensors[key])
            if values.nbytes:
                file.write(_memory(values))

    return write


def _pickle_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """A zip archive by ``torch.save`` with the metadata as its comment, which torch and the PEFT library pass over."""

    def write(file: BinaryIO) -> None:
        plain: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key in sorted(tensors):
            values = _plain(tensors[key])
            storage = values.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != values.nbytes:
                values = values.clone()
            plain[key] = values
            seen.add(values.untyped_storage().data_ptr())
        torch.save(plain, file)
        comment = json.dumps(dict(metadata), sort_keys=True).encode()
        if len(comment) > MAX_METADATA_BYTES:
            raise UnwritableError(
                f"metadata of {len(comment):,} bytes; a '.bin' holds at most {MAX_METADATA_BYTES:,}."
            )
        # An archive ends with the length of its comment, 0 so far.
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(comment)) + comment)

    return write
