"""The downloads, against a server on this machine."""

import dataclasses
import hashlib
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from moe_router.errors import DataError
from moe_router.training.data.download import ENWIK8, SHAKESPEARE, PublicFile, load_public

CONTENT = b"to be or not to be\n" * 100


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", content)
    return out.getvalue()


class Server(HTTPServer):
    """Answers each path with a body and a declared length, and counts the requests."""

    requests = 0
    pages: ClassVar = {
        "/plain": (CONTENT, len(CONTENT)),
        "/zip": (zipped(CONTENT), len(zipped(CONTENT))),
        "/other": (CONTENT[::-1], len(CONTENT)),
        "/longer": (CONTENT * 2, len(CONTENT) * 2),
        "/truncated": (CONTENT[:500], len(CONTENT)),
        "/truncated_zip": (zipped(CONTENT)[:-30], len(zipped(CONTENT)) - 30),
    }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        body, length = self.server.pages.get(self.path, (b"", -1))
        self.send_response(200 if length >= 0 else 404)
        self.send_header("Content-Length", str(max(length, 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the test output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def public(port: int, page: str) -> PublicFile:
    return PublicFile(
        source="enwik8",
        url=f"http://127.0.0.1:{port}{page}",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        train=1000,
        val=100,
    )


@pytest.mark.parametrize("page", ["/plain", "/zip"])
def test_a_download_is_unpacked_checked_and_kept(server: Server, tmp_path: Path, page: str) -> None:
    file = public(server.server_port, page)
    for _ in range(2):
        assert load_public(file, None, str(tmp_path / "cache")).tobytes() == CONTENT
    assert server.requests == 1
    assert (tmp_path / "cache" / "enwik8").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("/other", "sha256 [0-9a-f]{12}…, want enwik8's [0-9a-f]{12}…"),
        ("/longer", "more than 1,900 bytes, want enwik8's 1,900"),
        ("/truncated", "500 bytes, want enwik8's 1,900"),
        ("/truncated_zip", "sent is no whole zip"),
        ("/missing", "answers 404 Not Found"),
    ],
)
def test_a_bad_download_names_the_fix_and_leaves_nothing(
    server: Server, tmp_path: Path, page: str, reason: str
) -> None:
    file = public(server.server_port, page)
    with pytest.raises(DataError, match=f"{reason}.*download it by hand and set data.path") as bad:
        load_public(file, None, str(tmp_path))
    assert file.url in str(bad.value) and "\n" not in str(bad.value)
    assert [p.name for p in tmp_path.iterdir()] == [".enwik8.lock"]


def test_offline_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound and not listening: the port refuses
        taken.bind(("127.0.0.1", 0))
        file = public(taken.getsockname()[1], "/plain")
        with pytest.raises(
            DataError,
            match=r"data.source=enwik8: cannot download http://127\S+ \(.*refused\); "
            "download it by hand and set data.path",
        ):
            load_public(file, None, str(tmp_path), timeout=5)


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file = public(silent.getsockname()[1], "/plain")
        with pytest.raises(DataError, match=r"cannot download .*timed out.*by hand"):
            load_public(file, None, str(tmp_path), timeout=0.2)


def test_a_damaged_cache_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=r"1,899 bytes, want enwik8's 1,900; delete it to download"):
        load_public(public(server.server_port, "/plain"), None, str(tmp_path))


def test_a_local_copy_needs_no_network(tmp_path: Path) -> None:
    copy = tmp_path / "enwik8.zip"
    copy.write_bytes(zipped(CONTENT))
    assert load_public(public(9, "/none"), str(copy), "nowhere").tobytes() == CONTENT
    copy.write_bytes(zipped(CONTENT[::-1]))
    with pytest.raises(DataError, match=r"enwik8.zip: sha256 .*data.source=text reads other files"):
        load_public(public(9, "/none"), str(copy), "nowhere")


def test_an_unwritable_cache_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache=.*cannot be written.*set data.cache"):
        load_public(public(9, "/none"), None, str(tmp_path / "file" / "cache"))


def test_the_splits_are_the_standard_ones() -> None:
    assert (ENWIK8.train, ENWIK8.val, ENWIK8.size) == (90_000_000, 5_000_000, 100_000_000)
    assert SHAKESPEARE.train == int(0.9 * SHAKESPEARE.size)
    assert SHAKESPEARE.train + SHAKESPEARE.val == SHAKESPEARE.size
    for file in (ENWIK8, SHAKESPEARE):
        assert len(dataclasses.asdict(file)["sha256"]) == 64
