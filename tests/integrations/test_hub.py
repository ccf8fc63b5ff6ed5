"""Two files down and a directory up, against a hub of our own on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

import inlay
from inlay.errors import CorruptFileError, MissingFileError, UnwritableError
from inlay.formats.files import CONFIG_NAME, PICKLE_NAME, SAFETENSORS_NAME, read_pair, write_pair
from inlay.integrations.hub import fetch, push

COMMIT = "c0ffee" + "0" * 34
REPO = "owner/adapter"


class Hub(ThreadingHTTPServer):
    """The few routes that downloads and uploads of small files take."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.commits: list[list[dict[str, object]]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.refuses = False

    def got(self) -> set[str]:
        return {path.split("/")[-1] for verb, path, _ in self.asked if verb == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(self) -> str:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Authorization", "")))
        return path

    def do_GET(self) -> None:
        path = self.note()
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in self.server.files or f"/{REPO}/" not in path:
            self.reply(404, X_Error_Code="EntryNotFound" if f"/{REPO}/" in path else "RepoNotFound")
            return
        body = self.server.files[name]
        self.reply(200, body, ETag=f'"{hash(body)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self.note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            self.reply(403, b'{"error": "not yours"}')
        elif path == "/api/repos/create":
            self.answer({"url": f"{self.server.endpoint}/{REPO}", **json.loads(body)})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{self.server.endpoint}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({})

    def answer(self, body: object) -> None:
        self.reply(200, json.dumps(body).encode(), Content_Type="application/json")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def saved(directory: Path, r: int = 8, safe: bool = True) -> dict[str, bytes]:
    write_pair(directory, {"r": r}, {"a": torch.full((2,), r)}, safe_serialization=safe)
    (directory / "README.md").write_text("# card")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("safe", [True, False])
def test_two_files_and_no_other(tmp_path: Path, hub: Hub, safe: bool) -> None:
    hub.files = saved(tmp_path / "there", safe=safe) | {"pytorch_model.bin": b"", "evil.py": b""}
    directory = fetch(REPO, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, token="hf_secret")
    weights = SAFETENSORS_NAME if safe else PICKLE_NAME
    assert {path.name for path in directory.iterdir()} == {CONFIG_NAME, weights}
    assert read_pair(directory).config == {"r": 8}
    assert hub.got() <= {CONFIG_NAME, weights}
    assert {token for _, _, token in hub.asked} == {"Bearer hf_secret"}


def test_the_config_alone(tmp_path: Path, hub: Hub) -> None:
    hub.files = saved(tmp_path / "there")
    directory = fetch(REPO, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, token=False, weights=False)
    assert [path.name for path in directory.iterdir()] == [CONFIG_NAME]


def test_public_calls_fetch_what_they_read(tmp_path: Path, hub: Hub) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3))

    saved = inlay.get_peft_model(net(), inlay.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    saved.save_pretrained(tmp_path / "there")
    hub.files = {f"sub/{path.name}": path.read_bytes() for path in (tmp_path / "there").iterdir()}
    where: dict[str, Any] = {"subfolder": "sub", "cache_dir": tmp_path, "endpoint": hub.endpoint, "token": "hf_x"}
    where |= {"repo_type": "model", "etag_timeout": 5}
    assert inlay.PeftConfig.from_pretrained(REPO, **where) == inlay.LoraConfig.from_pretrained(tmp_path / "there")
    assert hub.got() == {CONFIG_NAME}
    loaded = inlay.PeftModel.from_pretrained(net(), REPO, revision=COMMIT, **where)
    assert hub.got() == {CONFIG_NAME, SAFETENSORS_NAME}
    assert torch.equal(loaded(torch.ones(1, 3)), saved(torch.ones(1, 3)))
    assert {token for _, _, token in hub.asked} == {"Bearer hf_x"}


def test_subfolder_and_one_commit_for_both(tmp_path: Path, hub: Hub) -> None:
    hub.files = {f"a/b/{name}": raw for name, raw in saved(tmp_path / "there").items()}
    directory = fetch(
        REPO, subfolder="a/b", revision="branch", cache_dir=tmp_path / "c", endpoint=hub.endpoint, token=False
    )
    assert directory.parts[-3:] == (COMMIT, "a", "b")
    assert read_pair(directory).config == {"r": 8}
    paths = {path for verb, path, _ in hub.asked if verb == "HEAD"}
    assert f"/{REPO}/resolve/branch/a/b/{CONFIG_NAME}" in paths
    assert f"/{REPO}/resolve/{COMMIT}/a/b/{SAFETENSORS_NAME}" in paths


def test_cached_and_offline(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = saved(tmp_path / "there")
    cache = tmp_path / "cache"
    online = fetch(REPO, cache_dir=cache, endpoint=hub.endpoint, token=False)
    hub.asked.clear()
    assert fetch(REPO, cache_dir=cache, endpoint=hub.endpoint, token=False, local_files_only=True) == online
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPO, cache_dir=cache, endpoint=hub.endpoint, token=False) == online
    with pytest.raises(MissingFileError, match=f"Can't find '{CONFIG_NAME}' at 'owner/other'") as caught:
        fetch("owner/other", cache_dir=cache, endpoint=hub.endpoint, token=False)
    assert caught.value.__cause__ is not None
    assert hub.asked == []


def test_force_download(tmp_path: Path, hub: Hub) -> None:
    hub.files = saved(tmp_path / "there")
    for force, got in (
        (False, {CONFIG_NAME, SAFETENSORS_NAME}),
        (False, set()),
        (True, {CONFIG_NAME, SAFETENSORS_NAME}),
    ):
        hub.asked.clear()
        fetch(REPO, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, token=False, force_download=force)
        assert hub.got() == got


@pytest.mark.parametrize(
    "model_id", [REPO, "owner/none", "not a repo id", "../up", "a/b/c", "/no/such/place", "nul\0"]
)
def test_nothing_there(tmp_path: Path, hub: Hub, model_id: str) -> None:
    with pytest.raises(MissingFileError, match=r"Can't find 'adapter_config\.json' at") as caught:
        fetch(model_id, cache_dir=tmp_path, endpoint=hub.endpoint, token=False)
    assert model_id in str(caught.value)
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value, ValueError)


def test_a_config_and_no_weights(tmp_path: Path, hub: Hub) -> None:
    hub.files = {CONFIG_NAME: b"{}"}
    with pytest.raises(MissingFileError, match=r"adapter_model\.safetensors' or 'adapter_model\.bin"):
        fetch(REPO, cache_dir=tmp_path, endpoint=hub.endpoint, token=False)


@pytest.mark.slow  # the hub library tries again for half a minute
def test_nobody_answers(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(MissingFileError) as caught:
        fetch(REPO, cache_dir=tmp_path, endpoint="http://127.0.0.1:9", token=False)
    assert caught.value.__cause__ is not None


def test_a_directory_is_taken_as_it_is(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.files = saved(tmp_path / "there")
    (tmp_path / REPO / "sub").mkdir(parents=True)
    assert fetch(REPO, endpoint=hub.endpoint) == Path(REPO)  # though the hub has one of that name
    assert fetch(tmp_path / REPO, subfolder="sub") == tmp_path / REPO / "sub"
    assert hub.asked == []


@pytest.mark.parametrize(
    "subfolder", ["..", "../x", "a/../../x", "/etc", "C:\\x", "C:x", "..\\x", "a\\..\\..\\x", "\\x", "\0"]
)
def test_subfolders_lead_nowhere_else(tmp_path: Path, subfolder: str) -> None:
    for model_id in (tmp_path, REPO):
        with pytest.raises(CorruptFileError, match="leads out"):
            fetch(model_id, subfolder=subfolder)


def test_push(tmp_path: Path, hub: Hub) -> None:
    want = saved(tmp_path)
    saved(tmp_path / "second")
    for junk in (".adapter_config.json.1.tmp", ".hidden"):
        (tmp_path / junk).write_text("junk")
    info = push(
        tmp_path, REPO, commit_message="mine", private=True, token="hf_secret", revision="dev", endpoint=hub.endpoint
    )
    assert info.oid == COMMIT
    ((header, *lines),) = hub.commits
    assert header["value"]["summary"] == "mine"
    got = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines}
    assert {name: raw for name, raw in got.items() if "/" not in name} == want
    assert {name for name in got if "/" in name} == {f"second/{name}" for name in want}
    posted = [path for verb, path, _ in hub.asked if verb == "POST"]
    assert "/api/repos/create" in posted
    assert f"/api/models/{REPO}/branch/dev" in posted
    assert f"/api/models/{REPO}/commit/dev" in posted
    assert {token for _, _, token in hub.asked} == {"Bearer hf_secret"}


def test_push_refused(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(MissingFileError, match="save the adapter"):
        push(tmp_path, REPO, endpoint=hub.endpoint)
    assert hub.asked == []
    saved(tmp_path)
    hub.refuses = True
    with pytest.raises(UnwritableError, match="cannot be written"):
        push(tmp_path, REPO, token="hf_secret", endpoint=hub.endpoint)
    assert hub.commits == []
