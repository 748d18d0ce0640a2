"""Datasets on the web (Python's server, on loopback): never a shorter one."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raylm.config.data import DataSection
from raylm.data import store as store_module
from raylm.data.cache import MANIFEST
from raylm.data.files import fingerprint
from raylm.data.report import DataReport, RejectedRow
from raylm.errors import DataError
from tests.data.remote_support import FORMATS, LINES, ROWS, SECRET, read, stopped_by, values_of


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    headers_of: dict[str, dict[str, str]] = {}
    cut: set[str] = set()

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        if name not in self.files:
            self.send_error(403 if name.startswith("secret") else 404)
            return
        body = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for key, value in self.headers_of.get(name, {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if name in self.cut else body)
            self.close_connection = name in self.cut

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, type[_Handler]]]:
    handler = type("Handler", (_Handler,), {"files": {}, "headers_of": {}, "cut": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_the_web(web: Any, name: str) -> None:
    """From a server that does not send parts of files."""
    address, handler = web
    handler.files[name], rows = FORMATS[name]
    assert values_of(read(f"{address}/{name}?token=1")) == rows


def test_a_file_that_the_server_declares_as_packed(web: Any) -> None:
    address, handler = web
    for name in ("a.jsonl.gz", "a.jsonl"):
        handler.files[name] = gzip.compress(LINES)
        handler.headers_of[name] = {"Content-Encoding": "gzip"}
        assert values_of(read(f"{address}/{name}")) == ROWS


def test_files_that_the_web_refuses(web: Any) -> None:
    address, _ = web
    assert stopped_by(f"{address}/absent.jsonl?token={SECRET}").startswith(
        f"{address}/absent.jsonl: cannot be read: the server answers 404 Not Found."
    )
    assert "cannot be read: the server answers 403 Forbidden." in stopped_by(f"{address}/secret.jsonl?token={SECRET}")
    assert "cannot be read: Cannot connect to host 127.0.0.1:9" in stopped_by("http://127.0.0.1:9/a.jsonl")


@pytest.mark.parametrize("name", FORMATS)
def test_a_server_that_cuts_off_is_an_error(web: Any, name: str) -> None:
    """Never a shorter dataset."""
    address, handler = web
    handler.files[name] = FORMATS[name][0]
    handler.cut.add(name)
    rows = read(f"{address}/{name}")
    assert rows[-1].index == -1
    assert rows[-1].problem == "cannot be read: the server ended its answer in the middle of the file."


def test_a_file_that_cannot_be_read_stops_the_run_behind_a_bad_row_too() -> None:
    bad = (RejectedRow("a", 0, "malformed", "is bad."), RejectedRow("a", -1, "malformed", "cannot be read: gone."))
    report = DataReport(rows=10, used=8, rejected=bad, tokens=1, loss_tokens=1)
    with pytest.raises(DataError, match="cannot be read: gone"):
        report.check("data.train", on_bad_row="quarantine", max_bad_share=1)


def test_another_web_file_has_another_fingerprint(web: Any) -> None:
    """A server that tells neither time nor etag gives none, and the dataset is not cached."""
    address, handler = web
    handler.files["a.jsonl"] = LINES
    path = f"{address}/a.jsonl"
    assert fingerprint(path) == ""
    seen = set()
    for headers in ({"ETag": "1"}, {"ETag": "2"}, {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}):
        handler.headers_of["a.jsonl"] = headers
        assert fingerprint(path) == fingerprint(path)
        seen.add(fingerprint(path))
    assert len(seen) == 3


def test_what_could_not_be_read_is_not_cached(
    ray_cluster: Any, web: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be read tomorrow."""
    monkeypatch.setattr(store_module, "num_bytes", lambda path: 0)  # the way of small datasets
    address, handler = web
    handler.files["a.jsonl"], handler.headers_of["a.jsonl"] = LINES, {"ETag": "1"}
    handler.cut.add("a.jsonl")
    section = DataSection.model_validate({"train": f"{address}/a.jsonl", "cache": str(tmp_path), "max_seq_len": 64})
    source = store_module.TokenizerSource(str(tiny_model_dir), "tiny")
    _, report = store_module.tokenize_files(section.train, section, source)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: the server ended its answer"):
        report.check("data.train", on_bad_row="quarantine", max_bad_share=1)
    handler.cut.clear()
    _, report = store_module.tokenize_files(section.train, section, source)
    assert (report.used, report.rejected) == (20, ())
    assert len(list(tmp_path.glob(f"*/{MANIFEST}"))) == 1
