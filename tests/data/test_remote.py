"""Datasets on object storage (moto's S3 server, on loopback): listing, reading, faults."""

import gzip
import os
import socket
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from raylm.config.data import DataSection
from raylm.data import parquet
from raylm.data.files import _matches, fingerprint
from raylm.data.readers import place_in_file
from raylm.data.remote import object_store, shown
from raylm.data.sources import list_files
from raylm.errors import DataError
from tests.data.remote_support import FORMATS, LINES, ROWS, paths, put, read, stopped_by, values_of


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_s3(bucket: Any, name: str) -> None:
    content, rows = FORMATS[name]
    put(bucket, f"in/{name}", content)
    assert values_of(read(f"s3://data/in/{name}")) == rows


def test_pages_of_parquet_on_s3_are_looked_at(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tests/data/test_parquet.py, where large column chunks are made for it."""
    monkeypatch.setattr(parquet, "_SMALL_CHUNK_BYTES", 0)
    monkeypatch.setattr(parquet, "_SMALL_DICTIONARY_BYTES", 0)
    put(bucket, "a.parquet", FORMATS["a.parquet"][0])
    assert values_of(read("s3://data/a.parquet")) == ROWS


def test_folders_patterns_and_lists_on_s3(bucket: Any) -> None:
    """The rules are those of local folders: sorted, nothing hidden, `*` stays within a folder."""
    for key in ("in/b.jsonl", "in/a.json.md", "in/.hidden.jsonl", "in/_tmp.jsonl", "in/sub/c.jsonl", "inner.jsonl"):
        put(bucket, key)
    put(bucket, "in/a.csv", FORMATS["a.csv"][0])
    put(bucket, "notes/a.md", b"")
    put(bucket, "in/empty/", b"")
    wanted = ["s3://data/in/a.csv", "s3://data/in/b.jsonl", "s3://data/in/sub/c.jsonl"]
    assert paths("s3://data/in") == paths("s3://data/in/") == wanted
    assert paths("s3://data/in/*.jsonl") == ["s3://data/in/_tmp.jsonl", "s3://data/in/b.jsonl"]
    assert paths("s3://data/**/c.jsonl") == ["s3://data/in/sub/c.jsonl"]
    assert paths("s3://data/*/[bc].jsonl") == ["s3://data/in/b.jsonl"]
    files = list_files(
        DataSection.model_validate({"train": ["s3://data/inner.jsonl", {"path": "s3://data/in", "weight": 0.5}]}).train
    )
    assert [file.weight for file in files] == [1, 0.5, 0.5, 0.5]
    assert len(values_of(read("s3://data/inner.jsonl", "s3://data/in"))) == 80
    for path, problem in {
        "s3://data/notes": "the folder holds no dataset files",
        "s3://data/in/*.txt": "the pattern matches no object",
        "s3://data/absent.jsonl": "there is no such object, folder or bucket",
        "s3://absent-bucket/a.jsonl": "there is no such object, folder or bucket",
    }.items():
        with pytest.raises(DataError, match=problem):
            paths(path)


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
        put(bucket, key)
    assert paths("s3://data/odd") == ["s3://data/odd/a b#c%20d+é.jsonl", "s3://data/odd/x.jsonl"]
    assert len(values_of(read("s3://data/odd"))) == 40


def test_an_endpoint_in_the_address(bucket: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    put(bucket, "in/a.jsonl")
    options = f"?endpoint_override={s3_server.removeprefix('http://')}&scheme=http"
    assert paths(f"s3://data/in{options}") == [f"s3://data/in/a.jsonl{options}"]
    assert values_of(read(f"s3://data/in/*.jsonl{options}")) == ROWS
    with pytest.raises(DataError, match="option color is unknown; known: endpoint_override, region, scheme"):
        paths("s3://data/in?color=red")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    assert paths("s3://data/in") == ["s3://data/in/a.jsonl"]


def test_faults_name_the_address_and_the_line(bucket: Any) -> None:
    put(bucket, "in/a.jsonl.gz", gzip.compress(LINES + b'\n{"a": "\xff"}\n'))
    bad = next(row for row in read("s3://data/in") if row.text is None)
    assert place_in_file("s3://data/in/a.jsonl.gz", bad.index, bad.line) == "s3://data/in/a.jsonl.gz: line 22"
    put(bucket, "in/a.jsonl.gz", gzip.compress(LINES)[:-20])
    assert read("s3://data/in")[-1].problem == "cannot be read: Truncated compressed stream."
    put(bucket, "b.parquet", FORMATS["a.parquet"][0][:-30])
    assert read("s3://data/b.parquet")[-1].problem.startswith("is not a readable Parquet file")


def _check_credentials(s3_server: str, from_request: bytes) -> None:
    headers = {"Content-Type": "text/plain"}
    urlopen(Request(f"{s3_server}/moto-api/reset-auth", data=from_request, headers=headers, method="POST"))


def test_refused_credentials(bucket: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z01. Also without any credentials."""
    put(bucket, "a.jsonl")
    _check_credentials(s3_server, from_request=b"0")
    try:
        message = stopped_by("s3://data/a.jsonl")
    finally:
        _check_credentials(s3_server, from_request=b"inf")
    assert message.startswith("s3://data/a.jsonl: cannot be listed: ")
    assert "ACCESS_DENIED" in message
    assert paths("s3://data/a.jsonl")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "ACCESS_DENIED" in stopped_by("s3://data/a.jsonl")


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = stopped_by("s3://data/a.jsonl", within_s=15)
    assert message.startswith("s3://data/a.jsonl: cannot be listed: ")
    assert "127.0.0.1:9" in message


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "Timeout was reached" in stopped_by("s3://data/a.jsonl")


def test_passwords_stay_out_of_addresses_and_messages() -> None:
    """Z01."""
    for path in ("s3://key:pass@data/a.jsonl", "https://user:pass@127.0.0.1/a.jsonl", "abfs://box:pass@host/a.jsonl"):
        with pytest.raises(DataError, match="holds a password") as fault:
            paths(path)
        assert ":pass" not in str(fault.value)
    assert shown("https://host/a.jsonl?X-Amz-Signature=1") == "https://host/a.jsonl"
    assert place_in_file("https://host/a.jsonl?sig=1", 0, 3) == "https://host/a.jsonl: line 3"
    assert shown("data/what?.jsonl") == "data/what?.jsonl"


def test_google_and_azure_addresses_have_their_file_systems() -> None:
    """Without a server, no more than this can be known here."""
    assert object_store("gs://box/a/b.jsonl")[0].type_name == "gcs"
    assert object_store("abfs://box@account.dfs.core.windows.net/a.jsonl")[0].type_name == "abfs"
    message = stopped_by("abfs://box@account.dfs.core.windows.net/a.jsonl")
    assert message.startswith("abfs://box@account.dfs.core.windows.net/a.jsonl: cannot be listed: ")


@pytest.mark.slow
def test_google_storage_gives_up() -> None:
    """Its own limit is 15 minutes."""
    assert "cannot be listed" in stopped_by("gs://anonymous@box/a.jsonl", within_s=60)


def test_another_object_has_another_fingerprint(bucket: Any) -> None:
    """Two writes of equal size within a second, which the time of change does not tell apart."""
    put(bucket, "a.jsonl", b'{"text": "a"}\n')
    before = fingerprint("s3://data/a.jsonl")
    assert fingerprint("s3://data/a.jsonl") == before
    put(bucket, "a.jsonl", b'{"text": "b"}\n')
    assert fingerprint("s3://data/a.jsonl") != before
