"""A stand-in for the Hugging Face hub on loopback: a repository of data from a folder, with what HfFileSystem asks for."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Hub:
    url: str
    repo: str  # USER/NAME
    ranges: list[tuple[int, int]] = field(default_factory=list)  # first and last byte of each read
    tokens: set[str | None] = field(default_factory=set)  # that came with requests
    required_token: str | None = None  # without it, the repository does not exist, as on the hub
    failures: int = 0  # so many reads are answered with 503


@contextlib.contextmanager
def hub(folder: Path, repo: str) -> Iterator[Hub]:
    """Serve a folder as hf://datasets/`repo`, to this process and to those that it starts."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, code: str) -> None:
            """As on the hub: what a user may not see does not exist, and needs a log-in."""
            self.answer(401 if code == "RepoNotFound" else 404, b"{}", **{"X-Error-Code": code})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            known.tokens.add(token)
            if f"/datasets/{repo}" not in path or (known.required_token and token != known.required_token):
                return self.missing("RepoNotFound")
            if found := re.fullmatch(rf"/datasets/{repo}/resolve/main/(.*)", path):
                return self.read(found[1])
            if found := re.fullmatch(rf"/api/datasets/{repo}/tree/main/?(.*)", path):
                return self.tree(found[1], "recursive=true" in self.path.lower())
            if path == f"/api/datasets/{repo}/revision/main" or path == f"/api/datasets/{repo}":
                return self.answer(200, json.dumps({"id": repo, "sha": "0" * 40}).encode())
            return self.missing("RevisionNotFound")

        do_HEAD = do_GET  # noqa: N815  # the name that http.server calls

        def read(self, name: str) -> None:
            if known.failures:
                known.failures -= 1
                return self.answer(503, b"busy")
            if name not in files:
                return self.missing("EntryNotFound")
            data = files[name]
            first, last = 0, len(data) - 1
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                first, last = int(found[1]), min(int(found[2]), last)
            known.ranges.append((first, last))
            of = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self.answer(206, data[first : last + 1], **of)

        def tree(self, folder: str, recursive: bool) -> None:
            found: dict[str, dict[str, Any]] = {}
            for name, data in files.items():
                if folder and not name.startswith(f"{folder}/"):
                    continue
                first, slash, _ = name[len(folder) + 1 if folder else 0 :].partition("/")
                if slash:
                    path = f"{folder}/{first}".lstrip("/")
                    found[path] = {"type": "directory", "path": path, "oid": "1" * 40, "size": 0}
                if recursive or not slash:
                    found[name] = {"type": "file", "path": name, "oid": "2" * 40, "size": len(data)}
            if not found:
                return self.missing("EntryNotFound")
            return self.answer(200, json.dumps(list(found.values())).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known = Hub(f"http://127.0.0.1:{server.server_port}", repo)
    thread = threading.Thread(target=server.serve_forever, name="hub")
    thread.start()
    import huggingface_hub
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", known.url)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setattr(constants, "ENDPOINT", known.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", known.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        huggingface_hub.HfFileSystem._cache.clear()
        try:
            yield known
        finally:
            huggingface_hub.HfFileSystem._cache.clear()
            server.shutdown()
            thread.join()
            server.server_close()
