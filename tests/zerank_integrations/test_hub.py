"""Downloading, caching and being offline, against a hub that speaks the real protocol on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from zerank_integrations import known
from zerank_integrations.checkpoints import CHECKPOINTS, DEFAULT


class Hub:
    """A hub that serves one folder as every model, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.asked.append(self.path)
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    self.send(*hub.listing(folder, "/".join(parts[2:4]), *parts[4:6]), body=body)
                elif "resolve" in parts:
                    at = parts.index("resolve")
                    self.send(*hub.file(folder / "/".join(parts[at + 2 :]), parts[at + 1]), body=body)
                else:
                    self.send(404, b"{}", {}, body=body)

            def send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def commit(revision: str) -> str:
        return revision if len(revision) == 40 else hashlib.sha1(revision.encode()).hexdigest()

    def listing(self, folder: Path, repository: str, kind: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        # A file of code, a pickle and a picture are offered too; only what is needed may be fetched.
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        sizes |= {"modeling_zeranker.py": 1, "pytorch_model.bin": 1, "chart.png": 1}
        tree = [{"type": "file", "path": name, "size": size, "oid": self.commit(name)} for name, size in sizes.items()]
        files = [{"rfilename": name} for name in sizes]
        facts = {
            "id": repository,
            "sha": self.commit(revision),
            "siblings": files,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        return 200, json.dumps(tree if kind == "tree" else facts).encode(), {"Content-Type": "application/json"}

    def file(self, path: Path, revision: str) -> tuple[int, bytes, dict[str, str]]:
        if not path.is_file():
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        content = path.read_bytes()
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit(revision)}


@pytest.fixture
def hub(tiny_stack: Path, tmp_path: Path) -> Iterator[Hub]:
    import shutil

    # The hub's listing is flat, so the stack's inner folder becomes a plain causal LM with the same files.
    folder = tmp_path / "repository"
    shutil.copytree(tiny_stack, folder, ignore=shutil.ignore_patterns("1_LogitScore", "modules.json"))
    served = Hub(folder)
    yield served
    served.server.shutdown()
    served.server.server_close()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run code with an empty cache of its own. The library reads its settings at import, so each run is a process."""

    def run(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = kept | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | settings
        program = "from zerank_integrations import Reranker\n" + textwrap.dedent(code)
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)

    return run


RANK = """
    print(Reranker({model!r}, dtype="float32", device="cpu"{more}).score("the river", ["a", "river bed"]))
"""


def test_download_cache_offline(hub: Hub, run: Run) -> None:
    """One download at the pinned revision through HF_ENDPOINT; afterwards the cache serves, online or off, by any name."""
    online = run(RANK.format(model=DEFAULT, more=""), HF_ENDPOINT=hub.address)
    assert online.returncode == 0, online.stderr
    revision = known(DEFAULT).revision
    assert all(revision in path for path in hub.asked if "zerank" in path)
    fetched = {path.split("?")[0].rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"modeling_zeranker.py", "pytorch_model.bin", "chart.png"}

    asked = len(hub.asked)
    for more, settings in (("", {"HF_HUB_OFFLINE": "1"}), (", local_files_only=True", {"HF_ENDPOINT": hub.address})):
        offline = run(RANK.format(model="zeroentropy/zerank-1-small", more=more), **settings)
        assert offline.stdout == online.stdout, offline.stderr
    assert len(hub.asked) == asked

    other = run(RANK.format(model="zeroentropy/zerank-2", more=""), HF_HUB_OFFLINE="1")
    assert other.returncode == 1
    for part in (
        "zeroentropy/zerank-2-reranker",
        "offline mode is on",
        f"cached models in {'/'}",
        DEFAULT,
        'Reranker("zelo-mini")',
    ):
        assert part in other.stderr


def test_a_revision_is_asked_for(hub: Hub, run: Run) -> None:
    done = run(RANK.format(model=DEFAULT, more=', revision="refs-experiment"'), HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    assert any("refs-experiment" in path for path in hub.asked)


def test_unreachable_says_why_and_what_to_do(run: Run) -> None:
    code = """
        from zerank_integrations import ModelUnreachable
        try:
            Reranker("someone/model").rank("q", ["d"])
        except ModelUnreachable as error:
            print(error)
    """
    # Port 9 is the discard service, which listens nowhere by default.
    done = run(code, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    for part in (
        "someone/model could not be had from http://127.0.0.1:9",
        "cached models in",
        ": none",
        "HF_HOME",
        "zelo-mini",
    ):
        assert part in done.stdout, done.stdout


def test_names() -> None:
    for checkpoint in CHECKPOINTS:
        for name in (checkpoint.name, checkpoint.repository, *checkpoint.older_names):
            assert known(name) is checkpoint
        assert checkpoint.licence.startswith("Apache-2.0")
    assert known("someone/model") is None
