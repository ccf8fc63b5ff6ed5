"""The two files of an adapter: exact bytes out, nothing believed in, and no pair that is half old and half new."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import signal
import stat
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from inlay.errors import (
    ConfigError,
    CorruptFileError,
    FileError,
    MissingFileError,
    TornPairError,
    UnreadableError,
    UnwritableError,
)
from inlay.formats.files import (
    CONFIG_NAME,
    PAIR_KEY,
    PICKLE_NAME,
    SAFETENSORS_NAME,
    TensorInfo,
    open_weights,
    read_config,
    read_pair,
    reseal,
    save_text,
    write_pair,
)

BOTH = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A read that waits for a FIFO's other end fails instead of holding up the run."""

    def stop(*_: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tensors() -> dict[str, Tensor]:
    return {
        "b.lora_A.weight": torch.arange(6.0).view(2, 3),
        "a.lora_B.weight": torch.arange(4, dtype=torch.bfloat16),
        "half": torch.ones(3, dtype=torch.float16),
        "double": torch.full((1, 1), 0.1, dtype=torch.float64),
        "index": torch.tensor([3, -1]),
        "narrow": torch.tensor([7], dtype=torch.int32),
        "flag": torch.tensor([True, False, True]),
        "byte": torch.tensor([255], dtype=torch.uint8),
        "unsigned": torch.tensor([65535], dtype=torch.uint16),
        "eight": torch.ones(5).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert got[key].shape == tensor.shape
        raw = [t.contiguous().view(-1).view(torch.uint8).tolist() if t.numel() else [] for t in (got[key], tensor)]
        assert raw[0] == raw[1], key


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# ---------------------------------------------------------------- there and back


@BOTH
def test_round_trip(tmp_path: Path, safe: bool) -> None:
    write_pair(tmp_path, {"r": 8}, tensors(), {"note": "ä"}, safe_serialization=safe)
    config, weights = read_pair(tmp_path)
    assert config == {"r": 8}
    assert weights.metadata["note"] == "ä"
    assert weights.metadata["format"] == "pt"
    assert weights.header == {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors().items()}
    same(weights.read(), tensors())
    same(weights.read(), tensors())  # and once more
    assert sorted(contents(tmp_path)) == sorted([CONFIG_NAME, weights.path.name])


def test_other_libraries_read_it(tmp_path: Path) -> None:
    write_pair(tmp_path / "s", {}, tensors())
    same(safetensors.torch.load_file(tmp_path / "s" / SAFETENSORS_NAME), tensors())
    write_pair(tmp_path / "b", {}, tensors(), safe_serialization=False)
    same(torch.load(tmp_path / "b" / PICKLE_NAME, weights_only=True), tensors())
    same(torch.load(tmp_path / "b" / PICKLE_NAME, weights_only=True, mmap=True), tensors())


def test_others_files_are_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"r": 4}')
    torch.save(tensors(), tmp_path / PICKLE_NAME)
    same(read_pair(tmp_path).weights.read(), tensors())
    with open_weights(tmp_path) as weights:
        assert weights.metadata == {}
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / SAFETENSORS_NAME)
    same(read_pair(tmp_path).weights.read(), {"x": torch.ones(2)})  # preferred to the pickle beside it


def test_bytes_are_safetensors_own(tmp_path: Path) -> None:
    """Same order, offsets, padding and data; only the metadata's order is fixed, where it is chance there."""
    write_pair(tmp_path, {}, tensors())
    ours = (tmp_path / SAFETENSORS_NAME).read_bytes()
    with open_weights(tmp_path) as weights:
        theirs = safetensors.torch.save(tensors(), weights.metadata)
    assert len(ours) == len(theirs)
    split = [8 + struct.unpack("<Q", raw[:8])[0] for raw in (ours, theirs)]
    assert split[0] == split[1]
    assert split[0] % 8 == 0
    assert ours[split[0] :] == theirs[split[1] :]
    headers = [json.loads(raw[8:n]) for raw, n in zip((ours, theirs), split, strict=True)]
    assert list(headers[0]) == list(headers[1])
    assert headers[0] == headers[1]
    assert list(headers[0]["__metadata__"]) == sorted(headers[0]["__metadata__"])


@BOTH
def test_same_values_same_bytes(tmp_path: Path, safe: bool) -> None:
    config = {"target_modules": {"q", "k", "v", "o"}, "r": 1, "ids": {10, 9}}
    turned = dict(reversed(list(tensors().items())))
    write_pair(tmp_path / "a", config, tensors(), {"x": "1", "y": "2"}, safe_serialization=safe)
    write_pair(tmp_path / "b", dict(reversed(config.items())), turned, {"y": "2", "x": "1"}, safe_serialization=safe)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert json.loads((tmp_path / "a" / CONFIG_NAME).read_text()) == {
        "ids": [9, 10],
        "r": 1,
        "target_modules": ["k", "o", "q", "v"],
    }


@BOTH
def test_views_and_shared_memory_are_written_in_full(tmp_path: Path, safe: bool) -> None:
    base = torch.arange(12.0).view(3, 4)
    given = {"whole": base, "again": base, "turned": base.t(), "row": base[1], "wide": torch.ones(1).expand(5)}
    given["grad"] = torch.nn.Parameter(torch.ones(2))
    write_pair(tmp_path, {}, given, safe_serialization=safe)
    with open_weights(tmp_path) as weights:
        got = weights.read()
    same(got, {key: tensor.detach() for key, tensor in given.items()})
    assert len({tensor.untyped_storage().data_ptr() for tensor in got.values()}) == len(given)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in got.values())


@BOTH
def test_what_is_read_is_the_callers(tmp_path: Path, safe: bool) -> None:
    path = tmp_path / (SAFETENSORS_NAME if safe else PICKLE_NAME)
    write_pair(tmp_path, {}, {"a": torch.ones(1000), "b": torch.ones(1000)}, safe_serialization=safe)
    with open_weights(tmp_path) as weights:
        got = weights.read()
        path.write_bytes(bytes(path.stat().st_size))  # in place, where a mapping would show it
    assert torch.equal(got["a"], torch.ones(1000))
    got["a"].add_(1)
    assert torch.equal(got["b"], torch.ones(1000))
    torch.nn.Linear(1, 1).weight = torch.nn.Parameter(got["a"])
    assert not any(path.read_bytes())


def test_read_on_a_device(tmp_path: Path) -> None:
    write_pair(tmp_path, {}, {"a": torch.ones(2)})
    with open_weights(tmp_path) as weights:
        assert weights.read(device="meta")["a"].is_meta
        with torch.device("meta"):
            assert torch.equal(weights.read()["a"], torch.ones(2, device="cpu"))


def test_what_was_checked_is_what_is_read(tmp_path: Path) -> None:
    write_pair(tmp_path, {"v": 1}, {"a": torch.ones(2)})
    with open_weights(tmp_path) as weights:
        write_pair(tmp_path, {"v": 2}, {"other": torch.zeros(9)})
        same(weights.read(), {"a": torch.ones(2)})


def test_cut_short_while_open(tmp_path: Path) -> None:
    write_pair(tmp_path, {}, {"a": torch.ones(100)})
    with open_weights(tmp_path) as weights:
        os.truncate(weights.path, weights.path.stat().st_size - 4)
        with pytest.raises(CorruptFileError, match="4 bytes early"):
            weights.read()


def test_files_are_readable_to_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_pair(tmp_path, {}, {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


# ---------------------------------------------------------------- hostile files


def framed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = framed({"a": entry()}, bytes(8))
TWO_GIB = 2**31
BAD_SAFETENSORS = {
    "empty": (b"", "8 bytes early"),
    "seven bytes": (bytes(7), "1 bytes early"),
    "header cut": (GOOD[:20], "truncated"),
    "data cut": (GOOD[:-1], "truncated"),
    "data added": (GOOD + b"x", "belong to no tensor"),
    "length of 2**63": (framed({}, length=2**63), "limit"),
    "length over the limit": (framed({}, length=100_000_001), "limit"),
    "length over the file": (framed({}, length=99_999_999), "truncated"),
    "not JSON": (framed(b"{nope}"), "JSON"),
    "leading space": (framed(b" {}"), "begin with"),
    "not UTF-8": (framed(b'{"\xff": 1}'), "UTF-8"),
    "nested": (framed(b'{"a":' + b"[" * 100_000), "nested"),
    "nested objects": (framed(b'{"a":' * 100_000), "nested"),
    "huge integer": (framed(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
    "overlap": (framed({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b' overlaps"),
    "same span": (framed({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "hole": (framed({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "hole of 4"),
    "hole at the start": (framed({"a": entry(offsets=[4, 12])}, bytes(12)), "hole of 4"),
    "span too long": (framed({"a": entry(offsets=[0, 12])}, bytes(12)), "takes 8 bytes"),
    "span turned": (framed({"a": entry(offsets=[8, 0])}, bytes(8)), "start and an end"),
    "offsets below 0": (framed({"a": entry(offsets=[-8, 0])}, bytes(8)), "start and an end"),
    "three offsets": (framed({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "start and an end"),
    "offsets of floats": (framed({"a": entry(offsets=[0.0, 8.0])}, bytes(8)), "start and an end"),
    "unknown dtype": (framed({"a": entry(dtype="F33")}, bytes(8)), "unknown dtype 'F33'"),
    "dtype of a list": (framed({"a": entry(dtype=["F32"])}, bytes(8)), "unknown dtype"),
    "negative shape": (framed({"a": entry(shape=[-2])}, bytes(8)), "natural numbers"),
    "boolean shape": (framed({"a": entry(shape=[True, 2])}, bytes(8)), "natural numbers"),
    "empty but endless": (framed({"a": entry([0, 2**62, 2**62], [0, 0])}), "natural numbers"),
    "1,000 dimensions": (framed({"a": entry([1] * 1000 + [2])}, bytes(8)), "natural numbers"),
    "2 GiB in 8 bytes": (framed({"a": entry([TWO_GIB // 4])}, bytes(8)), "takes 2,147,483,648"),
    "2 GiB not there": (framed({"a": entry([TWO_GIB // 4], [0, TWO_GIB])}, bytes(8)), "truncated"),
    "shape that overflows": (framed({"a": entry([2**40, 2**40])}, bytes(8)), "takes"),
    "key twice": (framed(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "'a' occurs twice"),
    "no shape": (framed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "expected an object"),
    "one field more": (framed({"a": {**entry(), "code": "x"}}, bytes(8)), "expected an object"),
    "entry of a number": (framed({"a": 1}), "expected an object"),
    "metadata of a list": (framed({"__metadata__": ["x"]}), "metadata"),
    "metadata of numbers": (framed({"__metadata__": {"x": 1}}), "metadata"),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path: Path, name: str) -> None:
    raw, why = BAD_SAFETENSORS[name]
    (tmp_path / SAFETENSORS_NAME).write_bytes(raw)
    with peak_below(8 * 2**20), pytest.raises(CorruptFileError, match=why) as caught:
        open_weights(tmp_path)
    assert str(tmp_path / SAFETENSORS_NAME) in str(caught.value)
    assert "Nothing was loaded" in str(caught.value)


class peak_below:
    """Fails when the block has Python, or the process, take more memory than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.resident = resident()
        tracemalloc.start()

    def __exit__(self, *exc: object) -> None:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < self.limit
        assert resident() - self.resident < 64 * 2**20


def resident() -> int:
    """The most this process ever had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_good_one_for_comparison(tmp_path: Path) -> None:
    (tmp_path / SAFETENSORS_NAME).write_bytes(GOOD)
    with open_weights(tmp_path) as weights:
        same(weights.read(), {"a": torch.zeros(2)})


def test_truncations_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, {}, tensors())
    whole = (tmp_path / SAFETENSORS_NAME).read_bytes()
    for n in range(0, len(whole), 3):
        (tmp_path / SAFETENSORS_NAME).write_bytes(whole[:n])
        with pytest.raises(CorruptFileError):
            open_weights(tmp_path)


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / SAFETENSORS_NAME).write_bytes(framed({"\x1b[2J" + "x" * 10_000: entry(dtype="F33")}, bytes(8)))
    with pytest.raises(CorruptFileError) as caught:
        open_weights(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


class Payload:
    """Unpickled with the ordinary unpickler, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def archive(edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes for one tensor of six, with its pickle edited."""
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            raw = source.read(name)
            target.writestr(name, edit(raw) if name.endswith("data.pkl") else raw)
    return out.getvalue()


def numbers_replaced(raw: bytes, which: int, value: int) -> bytes:
    """The pickle with its `which`-th small integer 6 (0: elements of the storage, 1: of the shape) made another."""
    at = -1
    for _ in range(which + 1):
        at = raw.index(b"K\x06", at + 1)
    return raw[:at] + b"J" + struct.pack("<i", value) + raw[at + 2 :]


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


BAD_PICKLES: dict[str, Callable[[Path], bytes]] = {
    "payload": lambda marker: saved({"a": Payload(marker)}),
    "payload as key": lambda marker: saved({"a": torch.ones(1), Payload(marker): 1}),
    "payload in the old format": lambda marker: pickle.dumps({"a": Payload(marker)}),
    "payload of another protocol": lambda marker: archive(lambda _: pickle.dumps({"a": Payload(marker)}, protocol=4)),
    "a whole module": lambda _: saved(torch.nn.Linear(1, 1)),
    "a list": lambda _: saved([torch.ones(1)]),
    "a number": lambda _: saved({"a": 1}),
    "a key that is no string": lambda _: saved({1: torch.ones(1)}),
    "a sparse tensor": lambda _: saved({"a": torch.eye(2).to_sparse()}),
    "bytes of any size": lambda _: archive(lambda _: b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R."),
    "tensor of any size": lambda _: archive(lambda _: b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x70\x85R."),
    "storage beyond its record": lambda _: archive(lambda raw: numbers_replaced(raw, 0, 2**29)),
    "shape beyond its storage": lambda _: archive(lambda raw: numbers_replaced(raw, 1, 2**29)),
    "expanded to 2 GiB": lambda _: saved({"a": torch.ones(1).expand(2**29)}),
    "compressed": lambda _: archive(lambda raw: raw + bytes(2**20), zipfile.ZIP_DEFLATED),
    "pickle cut": lambda _: archive(lambda raw: raw[:-20]),
    "no pickle": lambda _: b"PK\x05\x06" + bytes(18),
    "archive cut": lambda _: saved({"a": torch.ones(100)})[:-30],
    "empty": lambda _: b"",
    "noise": lambda _: random.Random(0).randbytes(1000),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_bad_pickle(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"
    (tmp_path / PICKLE_NAME).write_bytes(BAD_PICKLES[name](marker))
    with peak_below(8 * 2**20), pytest.raises(CorruptFileError) as caught:
        open_weights(tmp_path)
    assert not marker.exists()
    assert "Nothing was loaded" in str(caught.value)


def test_the_payload_is_one(tmp_path: Path) -> None:
    """Without this the test above would pass with a payload that does nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_refused_pickle_says_so(tmp_path: Path) -> None:
    (tmp_path / PICKLE_NAME).write_bytes(saved({"a": Payload(tmp_path)}))
    with pytest.raises(
        CorruptFileError, match=r"only a dictionary of tensors.*posix system.*nothing of it was executed"
    ):
        open_weights(tmp_path)


def test_pickled_parameters_and_turned_tensors(tmp_path: Path) -> None:
    given = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.arange(6.0).view(2, 3).t()}
    torch.save(given, tmp_path / PICKLE_NAME)
    with open_weights(tmp_path) as weights:
        got = weights.read()
    same(got, {key: tensor.detach() for key, tensor in given.items()})
    assert all(type(tensor) is Tensor and tensor.is_contiguous() for tensor in got.values())


BAD_CONFIGS = {
    "empty": (b"", "JSON"),
    "a list": (b"[]", "list"),
    "cut": (b'{"r": 8', "JSON"),
    "key twice": (b'{"r": 8, "r": 2000000}', "'r' occurs twice"),
    "inner key twice": (b'{"rank_pattern": {"q": 1, "q": 2}}', "'q' occurs twice"),
    "NaN": (b'{"lora_alpha": NaN}', "not finite"),
    "infinity": (b'{"lora_alpha": -Infinity}', "not finite"),
    "1e999": (b'{"lora_alpha": 1e999}', "not finite"),
    "Latin-1": (b'{"r\xe9": 1}', "UTF-8"),
    "nested": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    "nested some": (b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}", "nested 51 deep"),
    "long number": (b'{"r": ' + b"9" * 10_000 + b"}", "JSON"),
    "11 MiB": (b'{"a": "' + b"x" * (11 * 2**20) + b'"}', "limit"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(tmp_path: Path, name: str) -> None:
    raw, why = BAD_CONFIGS[name]
    (tmp_path / CONFIG_NAME).write_bytes(raw)
    with pytest.raises(CorruptFileError, match=why) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1000


def test_missing_files(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nope", tmp_path / "nul\0"):
        with pytest.raises(MissingFileError) as caught:
            read_config(directory)
        assert str(caught.value).startswith(f"Can't find 'adapter_config.json' at '{directory}'")
        assert isinstance(caught.value, ValueError)
        with pytest.raises(MissingFileError, match=r"adapter_model\.safetensors' or 'adapter_model\.bin'"):
            open_weights(directory)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO"),
    "directory": (os.mkdir, "is a directory"),
    "loop of links": (make_loop, "cannot be read"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "link to a FIFO": (lambda path: (os.mkfifo(f"{path}.x"), path.symlink_to(f"{path}.x")), "is a FIFO"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME])
def test_not_a_regular_file(tmp_path: Path, name: str, kind: str) -> None:
    make, why = NOT_FILES[kind]
    make(tmp_path / name)
    begun = time.monotonic()
    with pytest.raises(CorruptFileError, match=why):
        (read_config if name == CONFIG_NAME else open_weights)(tmp_path)
    assert time.monotonic() - begun < 1


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    write_pair(tmp_path / "blobs", {"r": 1}, {"a": torch.ones(1)})
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, SAFETENSORS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    assert read_pair(tmp_path / "snapshot").config == {"r": 1}
    write_pair(tmp_path / "snapshot", {"r": 2}, {"a": torch.ones(1)})
    assert read_pair(tmp_path / "blobs").config == {"r": 1}  # the link was replaced, not what it points to
    assert read_pair(tmp_path / "snapshot").config == {"r": 2}


# ---------------------------------------------------------------- the pair


@BOTH
@pytest.mark.parametrize("stray", ["config", "weights"])
def test_a_mixed_pair_is_refused(tmp_path: Path, safe: bool, stray: str) -> None:
    name = CONFIG_NAME if stray == "config" else SAFETENSORS_NAME if safe else PICKLE_NAME
    for n in (1, 2):
        write_pair(tmp_path / str(n), {"r": n}, {"a": torch.full((1,), n)}, safe_serialization=safe)
    (tmp_path / "1" / name).write_bytes((tmp_path / "2" / name).read_bytes())
    with pytest.raises(TornPairError, match="not of one save"):
        read_pair(tmp_path / "1")
    reseal(tmp_path / "1")
    assert read_pair(tmp_path / "1").config == {"r": 2 if stray == "config" else 1}
    assert read_pair(tmp_path / "1").weights.read()["a"] == (1 if stray == "config" else 2)


def test_another_byte_is_another_config(tmp_path: Path) -> None:
    write_pair(tmp_path, {"r": 1}, {})
    path = tmp_path / CONFIG_NAME
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(TornPairError):
        read_pair(tmp_path)


def test_a_save_under_way_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, {"r": 1}, {"a": torch.ones(1)})
    old = (tmp_path / CONFIG_NAME).read_bytes()
    write_pair(tmp_path, {"r": 2}, {"a": torch.ones(1)})
    new = (tmp_path / CONFIG_NAME).read_bytes()
    (tmp_path / CONFIG_NAME).write_bytes(old)
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / CONFIG_NAME).write_bytes(new))
    assert read_pair(tmp_path).config == {"r": 2}


@pytest.mark.parametrize("safe", [True, False])
def test_the_other_kind_of_weights_is_removed(tmp_path: Path, safe: bool) -> None:
    write_pair(tmp_path, {"r": 1}, {"a": torch.ones(1)}, safe_serialization=not safe)
    write_pair(tmp_path, {"r": 2}, {"a": torch.zeros(1)}, safe_serialization=safe)
    assert len(contents(tmp_path)) == 2
    assert read_pair(tmp_path).weights.read()["a"] == 0


# Every state a directory may be in before a save. The PEFT library's files carry no hash.
def _other_library(directory: Path, name: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).write_text('{"version": 1}')
    if name == SAFETENSORS_NAME:
        safetensors.torch.save_file(version(1), directory / name, {"format": "pt"})
    else:
        torch.save(version(1), directory / name)


def version(n: int) -> dict[str, Tensor]:
    return {"a": torch.full((1000,), float(n)), "b": torch.full((7,), float(n))}


def save_version(directory: Path, n: int, safe: bool = True) -> None:
    write_pair(directory, {"version": n}, version(n), safe_serialization=safe)


BEFORE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda directory: directory.mkdir(),
    "own safetensors": lambda directory: save_version(directory, 1),
    "own bin": lambda directory: save_version(directory, 1, safe=False),
    "other safetensors": lambda directory: _other_library(directory, SAFETENSORS_NAME),
    "other bin": lambda directory: _other_library(directory, PICKLE_NAME),
    "other, both": lambda directory: [_other_library(directory, name) for name in (SAFETENSORS_NAME, PICKLE_NAME)],
}


def found_version(directory: Path) -> int | str:
    """Which save a reader finds; fails on a mixture."""
    try:
        config, weights = read_pair(directory)
    except (TornPairError, MissingFileError) as error:
        return type(error).__name__
    with weights:
        values = {float(value) for tensor in weights.read().values() for value in tensor.unique()}
    assert values == {config["version"]}, f"a config of save {config} with weights of {values}"
    return int(values.pop())


def in_a_child(work: Callable[[], object]) -> int:
    """Forks, does the work there, and returns the child's id; the child never returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: forking beside other threads, idle ones here
        pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is gone at its `step`-th call that changes or secures a file, as with SIGKILL or a power cut."""
    calls = 0

    def mortal(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            if calls == step:
                os._exit(9)
            calls += 1
            return real(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))


@BOTH
@pytest.mark.parametrize("before", BEFORE)
def test_killed_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, safe: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a process dies here, not the machine
    outcomes: list[int | str] = []
    for step in range(100):
        directory = tmp_path / str(step)
        BEFORE[before](directory)
        old = found_version(directory)

        def work(step: int = step, directory: Path = directory) -> None:
            dying_at(step, monkeypatch)
            save_version(directory, 2, safe)

        _, status = os.waitpid(in_a_child(work), 0)
        outcomes.append(found_version(directory))
        allowed = {old, 2, "TornPairError"} | ({"MissingFileError"} if old == "MissingFileError" else set())
        assert outcomes[-1] in allowed
        save_version(directory, 3)  # what was left is no obstacle
        assert found_version(directory) == 3
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert os.waitstatus_to_exitcode(status) == 0
    assert outcomes[0] == old
    assert outcomes[-1] == 2
    assert len(outcomes) > 8


def kill_at_random(directory: Path, times: int) -> dict[int | str, int]:
    """Kills a process that saves without pause, again and again; what a reader found each time."""
    chance = random.Random(times)
    found: dict[int | str, int] = {}
    save_version(directory, 0)
    begun = time.perf_counter()
    save_version(directory, 0)
    took = time.perf_counter() - begun
    for _ in range(times):

        def work(seed: int = chance.randrange(1000)) -> None:
            choose = random.Random(seed)
            for n in range(1, 10**6):
                save_version(directory, n, safe=choose.random() < 0.5)

        pid = in_a_child(work)
        time.sleep(chance.random() * 4 * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcome = found_version(directory)
        found[outcome] = found.get(outcome, 0) + 1
    return found


def test_killed_at_random(tmp_path: Path) -> None:
    found = kill_at_random(tmp_path, 30)
    assert "MissingFileError" not in found
    assert any(isinstance(outcome, int) and outcome > 0 for outcome in found)  # they did get somewhere


@pytest.mark.slow
def test_killed_at_random_often(tmp_path: Path) -> None:
    signal.alarm(600)
    assert "MissingFileError" not in kill_at_random(tmp_path, 200)


def test_a_reader_beside_a_writer(tmp_path: Path) -> None:
    save_version(tmp_path, 0)

    def work() -> None:
        for n in range(10**6):
            save_version(tmp_path, n)

    pid = in_a_child(work)
    try:
        found: set[int | str] = set()
        end = time.monotonic() + 30
        while len(found) < 10 and time.monotonic() < end:
            found.add(found_version(tmp_path))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(found) > 2
    assert "MissingFileError" not in found


# ---------------------------------------------------------------- saves that cannot be made


FULL = OSError(errno.ENOSPC, "No space left on device")


@BOTH
@pytest.mark.parametrize("nth", range(2))
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, safe: bool) -> None:
    save_version(tmp_path, 1)
    before = contents(tmp_path)
    calls = iter(range(100))
    real = os.fsync

    def fsync(fd: int) -> None:
        if next(calls) == nth:
            raise FULL
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnwritableError, match="No space left"):
        save_version(tmp_path, 2, safe)
    assert contents(tmp_path) == before
    calls = iter([nth])
    with pytest.raises(UnwritableError, match="No space left"):
        save_version(tmp_path / "new", 2, safe)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for directory in (path, path / "below"):
        with pytest.raises(UnwritableError, match=r"file|Not a directory") as caught:
            write_pair(directory, {}, {})
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, OSError)
    assert path.read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UnwritableError, match="Permission denied"):
        write_pair(tmp_path, {}, {})
    tmp_path.chmod(0o755)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("read", [read_config, open_weights])
def test_a_file_that_the_system_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    write_pair(tmp_path, {"r": 1}, {"a": torch.ones(1)})

    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("inlay.formats.files.os.open", refuse)
    with pytest.raises(UnreadableError, match=r"cannot be read \(Permission denied\)") as caught:
        read(tmp_path)
    assert isinstance(caught.value, PermissionError)


@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_NAME])
def test_something_else_stands_there(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UnwritableError, match="not a regular file"):
        write_pair(tmp_path, {}, {"a": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == [name]


@BOTH
@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_values(tmp_path: Path, safe: bool, tensor: Tensor) -> None:
    with pytest.raises(UnwritableError, match="tensor 'x'"):
        write_pair(tmp_path / "new", {}, {"a": torch.ones(1), "x": tensor}, safe_serialization=safe)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("nan"), object(), torch.float32, {1: {2: object()}}, "x" * 2**24])
def test_configs_that_cannot_be_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError):
        write_pair(tmp_path, {"a": value}, {})
    assert contents(tmp_path) == {}


def test_leftovers_of_the_killed_are_swept(tmp_path: Path) -> None:
    fresh, stale, foreign = (tmp_path / name for name in (f".{CONFIG_NAME}.1.tmp", f".{CONFIG_NAME}.2.tmp", ".x.tmp"))
    for path in (fresh, stale, foreign):
        path.write_text("")
    for path in (stale, foreign):
        os.utime(path, (0, 0))
    write_pair(tmp_path, {}, {})
    assert [path.exists() for path in (fresh, stale, foreign)] == [True, False, True]


def test_save_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "README.md"
    save_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(FileError):
        save_text(path, "other")
    assert contents(path.parent) == {"README.md": "ä\n".encode()}


def test_the_hash_is_in_the_metadata(tmp_path: Path) -> None:
    write_pair(tmp_path, {"r": 8}, {}, {PAIR_KEY: "forged", "format": "forged"})
    with open_weights(tmp_path) as weights:
        assert weights.metadata == {
            "format": "pt",
            PAIR_KEY: hashlib.sha256((tmp_path / CONFIG_NAME).read_bytes()).hexdigest(),
        }
