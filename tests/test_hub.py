"""push_to_hub and from_pretrained: the real huggingface_hub client against a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from subjects import MOVING

import tokenpaths
from tokenpaths import Last, Site, TrailMap
from tokenpaths.trailmap import FILE_NAME

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """The few endpoints of the Hub that the client uses; one repository, of the user `me`."""

    def __init__(self, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = mode  # how files are to be sent: "regular" (inside the commit) or "lfs" (put beforehand)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str, bool]] = []  # method, path, with the user's token
        self.settings: dict[str, object] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == "Bearer hf_secret"
        self.server.calls.append((self.command, self.path, known))
        headers, code, reply = {}, 200, b"{}"
        if self.path == "/api/repos/create":
            self.server.settings = json.loads(body)
            reply = json.dumps({"url": f"{self.server.url}/me/{self.server.settings['name']}"}).encode()
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self.server.mode, "shouldIgnore": False} for f in files]
            reply = json.dumps({"files": modes}).encode()
        elif self.path.endswith("/info/lfs/objects/batch"):
            put = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            reply = json.dumps({"transfer": "basic", "objects": put}).encode()
        elif self.path.startswith("/put/"):
            assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/put/")
            self.server.objects[self.path.removeprefix("/put/")] = body
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            address = f"{self.server.url}/me/trail/commit/{COMMIT}"
            reply = json.dumps({"commitUrl": address, "commitOid": COMMIT, "pullRequestUrl": None}).encode()
        elif "/resolve/" in self.path:
            found = self.server.files.get(self.path.rpartition("/")[2])
            headers = {"X-Repo-Commit": COMMIT}
            if found is None or not self.path.startswith("/me/trail/"):
                code, headers["X-Error-Code"] = 404, "EntryNotFound"
            else:
                reply, headers["ETag"] = found, f'"{hashlib.sha1(found).hexdigest()}"'
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(reply))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["regular", "lfs"])
def hub(request) -> Iterator[Hub]:
    server = Hub(request.param)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def trails() -> TrailMap:
    shared = MOVING["LoReFT"](32)
    return TrailMap({Site(0, Last()): shared, Site(1, Last()): shared, Site(2): MOVING["nested"](32)})


# A process of its own: huggingface_hub reads its address and whether it is offline when it is imported.
CLIENT = """
import sys
from tokenpaths import TrailMap
address = TrailMap.load(sys.argv[1]).push_to_hub("trail", private=True, card="# Measured")
print(address)
for revision in (None, "v1"):
    TrailMap.from_pretrained("me/trail", revision=revision).save(sys.argv[2] + str(revision))
try:
    TrailMap.from_pretrained("me/other")
except Exception as error:
    print(type(error).__name__.removeprefix("Remote"))  # so it begins from huggingface_hub 1.0 on
"""


def test_what_is_pushed_to_the_hub_comes_back(hub, tmp_path):
    trails().save(tmp_path / "made")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tokenpaths.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "made"), str(tmp_path / "back")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{hub.url}/me/trail/commit/{COMMIT}", "EntryNotFoundError"]
    made = (tmp_path / "made").read_bytes()
    assert hub.files == {FILE_NAME: made, "README.md": b"# Measured"}
    assert (tmp_path / "backNone").read_bytes() == (tmp_path / "backv1").read_bytes() == made
    assert hub.settings["name"] == "trail"
    assert hub.settings.get("visibility") == "private" or hub.settings.get("private")  # before huggingface_hub 1.0
    calls = [(method, path) for method, path, known in hub.calls if known]
    assert calls.count(("POST", "/api/models/me/trail/commit/main")) == 1
    assert ("HEAD", f"/me/trail/resolve/v1/{FILE_NAME}") in calls
    assert not [path for _, path, _ in hub.calls if path.startswith("/me/other") and not path.endswith(FILE_NAME)]


def test_from_a_folder(tmp_path):
    model = FAMILIES["llama"].make()
    trails().save(tmp_path / "run" / FILE_NAME, model)
    loaded = TrailMap.from_pretrained(tmp_path / "run", model=model)
    assert repr(loaded) == repr(trails())
    assert all(map(torch.equal, loaded.state_dict().values(), trails().state_dict().values()))
    assert TrailMap.from_pretrained(str(tmp_path / "run")).index == (0, 0, 1)
    with pytest.warns(UserWarning, match="was made for LlamaForCausalLM"):
        TrailMap.from_pretrained(tmp_path / "run", model=FAMILIES["gpt2"].make())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "empty" / FILE_NAME))):
        TrailMap.from_pretrained(tmp_path / "empty")


def test_nothing_is_sent_when_the_trails_cannot_be_saved(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("a repository was made"))
    spoilt = trails()
    spoilt.trails[0].b.data[0] = float("nan")
    with pytest.raises(ValueError, match=re.escape("not saved: trails.0.b holds NaN")):
        spoilt.push_to_hub("trail")
