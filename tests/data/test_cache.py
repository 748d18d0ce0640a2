import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raylm.data.cache import MANIFEST, Cache, address, cache_root
from raylm.errors import DataError
from tests.data.support import at_once

TABLE = pa.table({"reason": ["", "too_long"], "problem": ["", "x"], "n": [1, 2]})


def test_an_entry_is_complete_or_absent(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), "key")
    shard = cache.write_shard(TABLE)
    assert cache.shards() is None
    cache.commit([shard])
    assert cache.shards() == [shard]
    assert cache.read_shard(shard) == TABLE
    assert Cache(str(tmp_path), "other").shards() is None


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone"])
def test_a_damaged_shard_is_found(tmp_path: Path, damage: str) -> None:
    cache = Cache(str(tmp_path), "key")
    shard = cache.write_shard(TABLE)
    cache.commit([shard])
    file = tmp_path / "key" / shard.name
    content = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        assert cache.shards() == [shard]
        assert cache.read_shard(shard) is None
    else:
        file.unlink() if damage == "gone" else file.write_bytes(content[:-1])
        assert cache.shards() is None


def test_a_damaged_manifest_counts_as_absent(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), "key")
    cache.commit([cache.write_shard(TABLE)])
    (tmp_path / "key" / MANIFEST).write_text('{"shards": [')
    assert cache.shards() is None


def test_two_runs_at_once_leave_a_whole_entry(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), "key")

    def run() -> None:
        cache.commit([cache.write_shard(TABLE) for _ in range(5)])

    at_once(run)
    shards = cache.shards()
    assert shards is not None
    assert [cache.read_shard(shard) for shard in shards] == [TABLE] * 5
    manifest = json.loads((tmp_path / "key" / MANIFEST).read_text())
    assert len(manifest["shards"]) == 5


def test_addresses_depend_on_every_part() -> None:
    assert address({"a": 1, "b": 2}) == address({"b": 2, "a": 1})
    assert address({"a": 1}) != address({"a": 2})


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLM_DATA_CACHE", str(tmp_path))
    assert cache_root(True, num_nodes=1) == str(tmp_path)
    assert cache_root(True, num_nodes=2) is None
    assert cache_root(False, num_nodes=1) is None
    assert cache_root(str(tmp_path / "x"), num_nodes=2) == str(tmp_path / "x")
    assert cache_root("s3://bucket/x", num_nodes=2) == "s3://bucket/x"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot hold the cache"):
        Cache(str(tmp_path / "file"), "key")
    with pytest.raises(DataError, match="cannot hold the cache"):
        Cache("ftp://host/x", "key")


def test_a_second_run_does_not_tokenise(
    ray_cluster: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Also: changed data, options and damaged shards are tokenised again; weights and epochs are not part of it."""
    from raylm.config.data import DataSection
    from raylm.data import store

    data = tmp_path / "a.jsonl"
    rows = [{"question": f"q{n}", "answer": "yes"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"bad": 1}]))
    source = store.TokenizerSource(str(tiny_model_dir), "tiny")
    calls: list[int] = []
    real = store._tokenized
    monkeypatch.setattr(store, "_tokenized", lambda *given: calls.append(1) or real(*given))

    def run(**options: Any) -> Any:
        tree = {"train": [{"path": str(data), "weight": options.pop("weight", 1)}], "cache": str(tmp_path / "cache")}
        section = DataSection.model_validate({**tree, "max_seq_len": 64, **options})
        found, report = store.tokenize_files(section.train, section, source)
        return found.lengths.tolist(), report.rejected_by_reason, report.rows

    first = run()
    assert first[1:] == ({"malformed": 1}, 9)
    assert run() == first
    assert run(weight=2) == first
    assert len(calls) == 1
    assert run(max_seq_len=32) == first
    assert len(calls) == 2
    assert run(max_rows=3)[0] == first[0][:3]
    for shard in (tmp_path / "cache").glob("*/*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert run() == first
    assert len(calls) == 4
    with data.open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    assert run()[2] == 10
    assert len(calls) == 5


def test_a_hub_dataset_is_cached_only_with_a_revision(ray_cluster: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    from raylm.config.data import DataSection
    from raylm.data.store import TokenizerSource, tokenize_files

    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    tree = {"train": f"hf://{hub}", "cache": str(tmp_path / "cache"), "max_seq_len": 64}
    section = DataSection.model_validate(tree)
    _, report = tokenize_files(section.train, section, TokenizerSource(str(tiny_model_dir), "tiny"))
    assert report.used == 1
    assert not (tmp_path / "cache").exists()
