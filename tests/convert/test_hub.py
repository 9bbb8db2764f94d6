"""A name of the hub stands wherever a folder of a model may, through an endpoint of the hub's own protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_retro.checkpoint.loading import describe_checkpoint
from tests.data.byte_level import save_byte_level

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A hub that holds one model, `team/model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hub")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **size)).save_pretrained(folder)
    save_byte_level(folder, ["</s>"])
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?", 1)[0]
            if path.startswith("/api/models/team/model"):
                files = sorted(folder.iterdir())
                entries = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0"} for one in files]
                told = {"id": "team/model", "sha": COMMIT, "siblings": [{"rfilename": one.name} for one in files]}
                return self.send(json.dumps(entries if "/tree/" in path else told).encode(), {}, body)
            file = folder / path.rsplit("/", 1)[-1]
            if not path.startswith("/team/model/resolve/") or not file.is_file() or file.suffix == ".bin":
                self.send_error(404)
                return None
            content = file.read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            return self.send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

        def send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def told(words: list[str], endpoint: str, home: Path, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "megatron_retro.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})


def test_a_model_comes_in_by_name_and_again_without_the_hub(endpoint: str, tmp_path: Path) -> None:
    for name, offline in (("first", False), ("second", True)):
        run = told(["convert", "team/model", str(tmp_path / name)], endpoint, tmp_path / "home", offline=offline)
        assert run.returncode == 0, run.stderr
        assert (tmp_path / name / "tokenizer/tokenizer.json").is_file()
        origin = describe_checkpoint(tmp_path / name).manifest.inputs["hugging_face"]
        assert origin == f"team/model@{COMMIT}"
    assert not list((tmp_path / "home").rglob("pytorch_model.bin"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some text"}\n')
    tokens = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "team/model", "--append-eod"]
    words = ["preprocess", "--input", str(text), "--output-prefix", str(tmp_path / "corpus"), *tokens]
    run = told(words, endpoint, tmp_path / "home", offline=True)
    assert run.returncode == 0, run.stderr


def test_a_name_that_is_nowhere_is_one_message(endpoint: str, tmp_path: Path) -> None:
    run = told(["convert", "team/other", str(tmp_path / "run")], endpoint, tmp_path / "home")
    assert run.returncode == 2
    assert "team/other is no folder here" in run.stderr and "Traceback" not in run.stderr
