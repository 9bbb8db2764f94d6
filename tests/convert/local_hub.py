"""A hub on this machine that speaks the protocol of huggingface_hub: models are fetched by name, made and pushed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """What it holds, `models` by name and branch, and what was asked of it. `room` is how many objects it takes."""

    address: str = ""
    token: str | None = None
    models: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    room: int | None = None

    def hold(self, name: str, folder: Path) -> None:
        """Have a model from a folder."""
        self.models[name, "main"] = {one.name: one.read_bytes() for one in folder.iterdir()}

    def files_of(self, name: str, revision: str) -> dict[str, bytes] | None:
        return self.models.get((name, "main" if revision == COMMIT else revision))

    def get(self, path: str) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            files = self.files_of(name, parts[5] if len(parts) > 5 else "main")
            if files is None:
                return 404, {}
            entries = [{"type": "file", "path": one, "size": len(files[one]), "oid": "0"} for one in files]
            told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in files]}
            return 200, entries if "tree" in parts else told
        if parts[2:3] != ["resolve"]:
            return 404, {}
        content = (self.files_of("/".join(parts[:2]), parts[3]) or {}).get("/".join(parts[4:]))
        return (404, {}) if content is None else (200, content)

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            told = {"url": f"{self.address}/{name}"}
            if name in self.visibility:
                return 409, told
            self.visibility[name] = "private" if asked.get("private") else asked.get("visibility", "public")
            self.models[name, "main"] = {}
            return 200, told
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.object_for(one) for one in json.loads(body)["objects"]]}
        name, branch = "/".join(parts[2:4]), parts[5]
        if parts[4] == "branch":
            self.models[name, branch] = dict(self.models[name, "main"])
            return 200, {}
        files = self.models[name, branch]
        if parts[4] == "preupload":
            return 200, {"files": [self.way_of(one["path"], files) for one in json.loads(body)["files"]]}
        assert parts[4] == "commit"
        for line in body.splitlines():
            value = (entry := json.loads(line))["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.objects[value["oid"]]
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.address}/{name}/commit/{COMMIT}"}

    def way_of(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        """How a file is to come; a file that is here by its git or LFS object."""
        is_large, content = path.endswith((".safetensors", ".py")), files.get(path)
        found = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if content is None:
            return found
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return found | {"oid": (hashlib.sha256(content) if is_large else git).hexdigest()}

    def object_for(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where an object is to be put, unless it is here."""
        if asked["oid"] in self.objects:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.address}/objects/{asked['oid']}"}}}

    def put(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.room is not None and len(self.uploads) >= self.room:
            return 403, {"error": "no more room"}
        oid = path.rsplit("/", 1)[-1]
        assert oid == hashlib.sha256(body).hexdigest()
        self.uploads.append(oid)
        self.objects[oid] = body
        return 200, {}


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """Answer until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.send(*hub.get(self.path.split("?", 1)[0]))

        do_GET = do_HEAD

        def do_POST(self) -> None:
            content = self.content()
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.send(401, {"error": "Invalid username or password."})
            else:
                self.send(*hub.post(self.path.split("?", 1)[0], content))

        def do_PUT(self) -> None:
            self.send(*hub.put(self.path, self.content()))

        def content(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def send(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()


def told(words: list[str], hub: LocalHub, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own that knows this hub alone."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-m", "megatron_retro.cli.main", *words]
    environment = {**os.environ, **settings, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
