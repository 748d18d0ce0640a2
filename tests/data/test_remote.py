"""Datasets and the cache on object storage (moto's S3 server) and on the web (Python's), both on loopback."""

import gzip
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from raylm.config.data import DataSection, SourceSection
from raylm.data import parquet
from raylm.data import store as store_module
from raylm.data.cache import MANIFEST, Cache
from raylm.data.files import _matches, fingerprint
from raylm.data.plan import plan_run
from raylm.data.readers import place_in_file, read_rows
from raylm.data.remote import object_store, shown
from raylm.data.report import DataReport, RejectedRow
from raylm.data.sources import list_files
from raylm.errors import DataError

ROWS = [{"question": f"wie {number}?", "answer": "ja " * (1 + number % 3)} for number in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [{"text": row["question"]} for row in ROWS]
LMFLOW = {"type": "text_only", "instances": TEXTS}
SECRET = "raylm-test-secret"


def _arrow_file(kind: str) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "csv":
        pa.csv.write_csv(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


FORMATS = {
    "a.jsonl": (LINES, ROWS),
    "a.jsonl.gz": (gzip.compress(LINES), ROWS),
    "a.jsonl.zst": (pa.compress(LINES, codec="zstd", asbytes=True), ROWS),
    "a.json": (json.dumps(LMFLOW).encode(), TEXTS),
    "a.json.gz": (gzip.compress(json.dumps(LMFLOW).encode()), TEXTS),
    "a.parquet": (_arrow_file("parquet"), ROWS),
    "a.arrow": (_arrow_file("arrow"), ROWS),
    "a.csv": (_arrow_file("csv"), ROWS),
    "a.txt": ("\n".join(row["text"] for row in TEXTS).encode(), TEXTS),
}


def _put(bucket: Any, key: str, body: bytes = LINES) -> None:
    bucket.put_object(Key=key, Body=body)


def _read(*sources: Any) -> list[Any]:
    section = DataSection.model_validate({"train": list(sources)})
    return [row for file in list_files(section.train) for row in read_rows(file.path, file.options)]


def _paths(path: str) -> list[str]:
    return [file.path for file in list_files([SourceSection(path=path)])]


def _values(rows: list[Any]) -> list[Any]:
    assert not [row.problem for row in rows if row.text is None]
    return [json.loads(row.text) for row in rows]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_s3(bucket: Any, name: str) -> None:
    content, rows = FORMATS[name]
    _put(bucket, f"in/{name}", content)
    assert _values(_read(f"s3://data/in/{name}")) == rows


def test_pages_of_parquet_on_s3_are_looked_at(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tests/data/test_parquet.py, where large column chunks are made for it."""
    monkeypatch.setattr(parquet, "_SMALL_CHUNK_BYTES", 0)
    monkeypatch.setattr(parquet, "_SMALL_DICTIONARY_BYTES", 0)
    _put(bucket, "a.parquet", FORMATS["a.parquet"][0])
    assert _values(_read("s3://data/a.parquet")) == ROWS


def test_folders_patterns_and_lists_on_s3(bucket: Any) -> None:
    """The rules are those of local folders: sorted, nothing hidden, `*` stays within a folder."""
    for key in ("in/b.jsonl", "in/a.json.md", "in/.hidden.jsonl", "in/_tmp.jsonl", "in/sub/c.jsonl", "inner.jsonl"):
        _put(bucket, key)
    _put(bucket, "in/a.csv", FORMATS["a.csv"][0])
    _put(bucket, "notes/a.md", b"")
    _put(bucket, "in/empty/", b"")
    wanted = ["s3://data/in/a.csv", "s3://data/in/b.jsonl", "s3://data/in/sub/c.jsonl"]
    assert _paths("s3://data/in") == _paths("s3://data/in/") == wanted
    assert _paths("s3://data/in/*.jsonl") == ["s3://data/in/_tmp.jsonl", "s3://data/in/b.jsonl"]
    assert _paths("s3://data/**/c.jsonl") == ["s3://data/in/sub/c.jsonl"]
    assert _paths("s3://data/*/[bc].jsonl") == ["s3://data/in/b.jsonl"]
    files = list_files(
        DataSection.model_validate({"train": ["s3://data/inner.jsonl", {"path": "s3://data/in", "weight": 0.5}]}).train
    )
    assert [file.weight for file in files] == [1, 0.5, 0.5, 0.5]
    assert len(_values(_read("s3://data/inner.jsonl", "s3://data/in"))) == 80
    for path, problem in {
        "s3://data/notes": "the folder holds no dataset files",
        "s3://data/in/*.txt": "the pattern matches no object",
        "s3://data/absent.jsonl": "there is no such object, folder or bucket",
        "s3://absent-bucket/a.jsonl": "there is no such object, folder or bucket",
    }.items():
        with pytest.raises(DataError, match=problem):
            _paths(path)


def test_patterns_are_those_of_folders(tmp_path: Path) -> None:
    """Held against `glob` over the same names."""
    import glob

    names = ["a.x", "b/a.x", "b/c/a.x", "b/.c/a.x", ".h.x", "b/a.y"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for pattern in ("*.x", "*/*.x", "**/*.x", "b/**/a.x", "[ab].x", "b/.c/*", "**/a.[xy]", "b/*/a.x"):
        found = {os.path.relpath(name, tmp_path) for name in glob.glob(f"{tmp_path}/{pattern}", recursive=True)}
        assert {name for name in names if _matches(name.split("/"), pattern.split("/"))} == found & set(names), pattern


def test_keys_are_taken_as_they_are(bucket: Any) -> None:
    for key in ("odd/a b#c%20d+é.jsonl", "odd/x.jsonl"):
        _put(bucket, key)
    assert _paths("s3://data/odd") == ["s3://data/odd/a b#c%20d+é.jsonl", "s3://data/odd/x.jsonl"]
    assert len(_values(_read("s3://data/odd"))) == 40


def test_an_endpoint_in_the_address(bucket: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    _put(bucket, "in/a.jsonl")
    options = f"?endpoint_override={s3_server.removeprefix('http://')}&scheme=http"
    assert _paths(f"s3://data/in{options}") == [f"s3://data/in/a.jsonl{options}"]
    assert _values(_read(f"s3://data/in/*.jsonl{options}")) == ROWS
    with pytest.raises(DataError, match="option color is unknown; known: endpoint_override, region, scheme"):
        _paths("s3://data/in?color=red")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    assert _paths("s3://data/in") == ["s3://data/in/a.jsonl"]


def test_faults_name_the_address_and_the_line(bucket: Any) -> None:
    _put(bucket, "in/a.jsonl.gz", gzip.compress(LINES + b'\n{"a": "\xff"}\n'))
    bad = next(row for row in _read("s3://data/in") if row.text is None)
    assert place_in_file("s3://data/in/a.jsonl.gz", bad.index, bad.line) == "s3://data/in/a.jsonl.gz: line 22"
    _put(bucket, "in/a.jsonl.gz", gzip.compress(LINES)[:-20])
    assert _read("s3://data/in")[-1].problem == "cannot be read: Truncated compressed stream."
    _put(bucket, "b.parquet", FORMATS["a.parquet"][0][:-30])
    assert _read("s3://data/b.parquet")[-1].problem.startswith("is not a readable Parquet file")


def _stops(path: str, within_s: float = 45) -> str:
    started = time.monotonic()
    with pytest.raises(DataError) as fault:
        _paths(path)
    assert time.monotonic() - started < within_s
    message = str(fault.value)
    assert SECRET not in message
    assert "\n" not in message
    return message


def _check_credentials(s3_server: str, from_request: bytes) -> None:
    headers = {"Content-Type": "text/plain"}
    urlopen(Request(f"{s3_server}/moto-api/reset-auth", data=from_request, headers=headers, method="POST"))


def test_refused_credentials(bucket: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z01. Also without any credentials."""
    _put(bucket, "a.jsonl")
    _check_credentials(s3_server, from_request=b"0")
    try:
        message = _stops("s3://data/a.jsonl")
    finally:
        _check_credentials(s3_server, from_request=b"inf")
    assert message.startswith("s3://data/a.jsonl: cannot be listed: ")
    assert "ACCESS_DENIED" in message
    assert _paths("s3://data/a.jsonl")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "ACCESS_DENIED" in _stops("s3://data/a.jsonl")


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = _stops("s3://data/a.jsonl", within_s=15)
    assert message.startswith("s3://data/a.jsonl: cannot be listed: ")
    assert "127.0.0.1:9" in message


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "Timeout was reached" in _stops("s3://data/a.jsonl")


def test_passwords_stay_out_of_addresses_and_messages() -> None:
    """Z01."""
    for path in ("s3://key:pass@data/a.jsonl", "https://user:pass@127.0.0.1/a.jsonl", "abfs://box:pass@host/a.jsonl"):
        with pytest.raises(DataError, match="holds a password") as fault:
            _paths(path)
        assert ":pass" not in str(fault.value)
    assert shown("https://host/a.jsonl?X-Amz-Signature=1") == "https://host/a.jsonl"
    assert place_in_file("https://host/a.jsonl?sig=1", 0, 3) == "https://host/a.jsonl: line 3"
    assert shown("data/what?.jsonl") == "data/what?.jsonl"


def test_google_and_azure_addresses_have_their_file_systems() -> None:
    """Without a server, no more than this can be known here."""
    assert object_store("gs://box/a/b.jsonl")[0].type_name == "gcs"
    assert object_store("abfs://box@account.dfs.core.windows.net/a.jsonl")[0].type_name == "abfs"
    message = _stops("abfs://box@account.dfs.core.windows.net/a.jsonl")
    assert message.startswith("abfs://box@account.dfs.core.windows.net/a.jsonl: cannot be listed: ")


@pytest.mark.slow
def test_google_storage_gives_up() -> None:
    """Its own limit is 15 minutes."""
    assert "cannot be listed" in _stops("gs://anonymous@box/a.jsonl", within_s=60)


def test_another_object_has_another_fingerprint(bucket: Any) -> None:
    """Two writes of equal size within a second, which the time of change does not tell apart."""
    _put(bucket, "a.jsonl", b'{"text": "a"}\n')
    before = fingerprint("s3://data/a.jsonl")
    assert fingerprint("s3://data/a.jsonl") == before
    _put(bucket, "a.jsonl", b'{"text": "b"}\n')
    assert fingerprint("s3://data/a.jsonl") != before


# The web


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
    assert _values(_read(f"{address}/{name}?token=1")) == rows


def test_a_file_that_the_server_declares_as_packed(web: Any) -> None:
    address, handler = web
    for name in ("a.jsonl.gz", "a.jsonl"):
        handler.files[name] = gzip.compress(LINES)
        handler.headers_of[name] = {"Content-Encoding": "gzip"}
        assert _values(_read(f"{address}/{name}")) == ROWS


def test_files_that_the_web_refuses(web: Any) -> None:
    address, _ = web
    assert _stops(f"{address}/absent.jsonl?token={SECRET}").startswith(
        f"{address}/absent.jsonl: cannot be read: the server answers 404 Not Found."
    )
    assert "cannot be read: the server answers 403 Forbidden." in _stops(f"{address}/secret.jsonl?token={SECRET}")
    assert "cannot be read: Cannot connect to host 127.0.0.1:9" in _stops("http://127.0.0.1:9/a.jsonl")


@pytest.mark.parametrize("name", FORMATS)
def test_a_server_that_cuts_off_is_an_error(web: Any, name: str) -> None:
    """Never a shorter dataset."""
    address, handler = web
    handler.files[name] = FORMATS[name][0]
    handler.cut.add(name)
    rows = _read(f"{address}/{name}")
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


# The cache

TABLE = pa.table({"reason": ["", "too_long"], "problem": ["", "x"], "n": [1, 2]})


def test_an_entry_on_s3_is_complete_or_absent(bucket: Any) -> None:
    cache = Cache("s3://data/cache", "key")
    shard = cache.write_shard(TABLE)
    assert cache.shards() is None
    cache.commit([shard])
    assert cache.shards() == [shard]
    assert cache.read_shard(shard) == TABLE
    bucket.Object(f"cache/key/{MANIFEST}").put(Body=b'{"shards": [')
    assert cache.shards() is None
    cache.commit([shard])
    content = bucket.Object(f"cache/key/{shard.name}").get()["Body"].read()
    _put(bucket, f"cache/key/{shard.name}", content[:-1] + b"x")
    assert cache.read_shard(shard) is None
    bucket.Object(f"cache/key/{shard.name}").delete()
    assert cache.shards() is None


def test_two_runs_at_once_leave_a_whole_entry_on_s3(bucket: Any) -> None:
    def run() -> None:
        cache = Cache("s3://data/cache", "key")
        cache.commit([cache.write_shard(TABLE) for _ in range(3)])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = Cache("s3://data/cache", "key")
    shards = cache.shards()
    assert shards is not None
    assert [cache.read_shard(shard) for shard in shards] == [TABLE] * 3


def test_a_cache_takes_no_credentials_along(bucket: Any) -> None:
    """Z01."""
    import pickle

    cache = Cache("s3://data/cache", "key")
    pickled = pickle.dumps(cache)
    assert SECRET.encode() not in pickled
    shard = pickle.loads(pickled).write_shard(TABLE)  # noqa: S301
    assert cache.read_shard(shard) == TABLE


def test_a_cache_that_cannot_be(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match="s3://absent-bucket/x: cannot hold the cache: Bucket 'absent-bucket' not found"
    ):
        Cache("s3://absent-bucket/x", "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot hold the cache"):
        Cache("s3://data/x", "key")


@pytest.mark.slow
def test_data_and_cache_on_s3_through_ray(
    ray_cluster: Any,
    bucket: Any,
    s3_server: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Filled, read again, damaged: always the rows, and the order of training, of local files."""
    monkeypatch.setattr(store_module, "SMALL_BYTES", -1)  # local files take the way of large datasets too
    calls: list[int] = []
    tokenized = store_module._tokenized
    monkeypatch.setattr(store_module, "_tokenized", lambda *given: calls.append(1) or tokenized(*given))
    options = f"?endpoint_override={s3_server.removeprefix('http://')}&scheme=http"  # Ray's workers started earlier
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        content = FORMATS["a" + name[1:]][0]
        _put(bucket, f"in/{name}", content)
        (tmp_path / "in" / name).write_bytes(content)

    def run(source: str, cache: str | bool) -> Any:
        section = DataSection.model_validate({"train": source, "cache": cache, "max_seq_len": 64})
        store, report = store_module.tokenize_files(
            section.train, section, store_module.TokenizerSource(str(tiny_model_dir), "tiny")
        )
        ids, masks = store_module.gather(store, store.blocks.argsort(kind="stable"))
        plan = plan_run(
            store.lengths, max_seq_len=64, packing=True, shuffle=True, seed=3, num_epochs=2, global_batch_size=8
        )
        order = [plan.row(step, place)[1].tolist() for step in range(plan.num_steps) for place in range(8)]
        return report.rows, [x.tolist() for x in ids], [x.tolist() for x in masks], order

    local = run(str(tmp_path / "in"), str(tmp_path / "cache"))
    assert local[0] == 60
    assert run(str(tmp_path / "in"), str(tmp_path / "cache")) == local
    assert len(calls) == 1
    remote, cache = f"s3://data/in{options}", f"s3://data/cache{options}"
    assert run(remote, cache) == local
    assert run(remote, cache) == local
    assert len(calls) == 2
    keys = [found.key for found in bucket.objects.filter(Prefix="cache/")]
    shard = next(key for key in keys if key.endswith(".parquet"))
    size = bucket.Object(shard).content_length
    _put(bucket, shard, b"x" * size)
    assert run(remote, cache) == local
    assert "is damaged: tokenising again" in caplog.text
    assert run(remote, cache) == local
    assert len(calls) == 3


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
