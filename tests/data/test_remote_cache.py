"""The cache of tokens on object storage (moto's S3 server, on loopback)."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raylm.config.data import DataSection
from raylm.data import store as store_module
from raylm.data.cache import MANIFEST, Cache
from raylm.data.plan import plan_run
from raylm.errors import DataError
from tests.data.remote_support import FORMATS, SECRET, put
from tests.data.support import at_once

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
    put(bucket, f"cache/key/{shard.name}", content[:-1] + b"x")
    assert cache.read_shard(shard) is None
    bucket.Object(f"cache/key/{shard.name}").delete()
    assert cache.shards() is None


def test_two_runs_at_once_leave_a_whole_entry_on_s3(bucket: Any) -> None:
    def run() -> None:
        cache = Cache("s3://data/cache", "key")
        cache.commit([cache.write_shard(TABLE) for _ in range(3)])

    at_once(run)
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
        put(bucket, f"in/{name}", content)
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
    put(bucket, shard, b"x" * size)
    assert run(remote, cache) == local
    assert "is damaged: tokenising again" in caplog.text
    assert run(remote, cache) == local
    assert len(calls) == 3
