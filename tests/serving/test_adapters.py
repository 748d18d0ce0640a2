"""Versions of adapters, on an engine that only keeps count (known fault W08)."""

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from raylm.errors import ModelError, ServingError
from raylm.serving import adapters as adapters_module
from raylm.serving.adapter_root import LocalRoot
from raylm.serving.adapters import UnknownAdapterError
from tests.serving.adapter_support import edit_config, pool_of, replace_adapter


def test_requests_that_come_together_load_once(adapter_root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)

    async def together() -> list[Any]:
        return await asyncio.gather(*(pool.get("one") for _ in range(20)))

    assert len({adapter.version for adapter in asyncio.run(together())}) == 1
    assert [engine_id for _, engine_id in engine.loads] == [1]


def test_new_files_are_a_new_version_under_a_new_id(
    adapter_root: Path, two_versions: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W08: neither an engine id, nor the name and path that key cached blocks, ever stand for two versions."""
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    replace_adapter(adapter_root / "one", two_versions / "v2")
    second = asyncio.run(pool.get("one"))
    assert (first.version, first.rank, second.rank) != (second.version, 4, 4)
    assert first.engine_id != second.engine_id
    assert first.engine_name != second.engine_name
    assert first.folder != second.folder
    assert (first.folder / "adapter_model.safetensors").read_bytes() == (
        two_versions / "v1" / "adapter_model.safetensors"
    ).read_bytes()
    replace_adapter(adapter_root / "one", two_versions / "v1")
    assert asyncio.run(pool.get("one")) is first  # the same weights: one id for one version, never two
    assert len(engine.loads) == 2


def test_files_are_looked_at_once_in_a_second_whoever_asks(
    adapter_root: Path, two_versions: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 60.0)
    pool, _ = pool_of(adapter_root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    replace_adapter(adapter_root / "one", two_versions / "v2")
    assert asyncio.run(pool.get("one")) is first
    assert asyncio.run(pool.get("one", force=True)).rank == 12  # what the reload route does


def test_the_version_is_that_of_the_files_whatever_the_copy(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path
) -> None:
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    shutil.copytree(adapter_root / "one", adapter_root / "again")
    first, again = asyncio.run(pool.get("one")), asyncio.run(pool.get("again"))
    assert first.version == again.version
    assert len({name for name, _ in engine.loads}) == 2
    os.utime(adapter_root / "one" / "adapter_config.json")
    assert asyncio.run(pool.get("one", force=True)) is first


def test_what_a_cancelled_request_began_is_kept_for_the_next(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Path] = []
    copy = adapters_module.copy_hashed

    def slow_copy(files: Any, folder: Path) -> str:
        copies.append(folder)
        time.sleep(0.3)
        return copy(files, folder)

    monkeypatch.setattr(adapters_module, "copy_hashed", slow_copy)

    async def steps() -> None:
        pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
        first = asyncio.create_task(pool.get("one"))
        await asyncio.sleep(0.15)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        found = await pool.get("one")
        assert (found.rank, len(engine.loads), len(copies)) == (4, 1, 1)
        assert not list((tmp_path / "copies").glob("*.partial"))

    asyncio.run(steps())


def test_a_refused_version_does_not_replace_the_one_that_is_served(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    edit_config(use_dora=True)(adapter_root / "one")
    assert asyncio.run(pool.get("one")) is first
    with pytest.raises(ModelError, match="uses DoRA"):
        asyncio.run(pool.load("one", force=True))
    one, two = asyncio.run(pool.rows())
    assert (one["version"], one["loaded"]) == (first.version, True)
    assert "uses DoRA" in one["error"]
    assert (two["rank"], two["loaded"], two["error"], two["last_used"]) == (12, False, None, None)
    edit_config(use_dora=False)(adapter_root / "one")
    assert asyncio.run(pool.get("one")).rank == 4
    assert asyncio.run(pool.rows())[0]["error"] is None
    assert len(engine.loads) <= 2


def test_a_refused_adapter_is_read_once_until_its_files_change(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    edit_config(use_dora=True)(adapter_root / "one")
    reads = []
    whole = pool._copy
    monkeypatch.setattr(pool, "_copy", lambda *given: reads.append(1) or whole(*given))
    for _ in range(3):
        with pytest.raises(ModelError, match="uses DoRA"):
            asyncio.run(pool.get("one"))
    assert len(reads) == 1
    edit_config(use_dora=False)(adapter_root / "one")
    assert asyncio.run(pool.get("one")).rank == 4
    assert len(engine.loads) == 1


def test_files_that_are_being_written_are_waited_for(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path
) -> None:
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    weights = adapter_root / "one" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])

    async def ask_while_it_grows() -> Any:
        async def grow() -> None:
            for end in (2000, 20_000, len(whole)):
                await asyncio.sleep(0.1)
                weights.write_bytes(whole[:end])

        growing = asyncio.create_task(grow())
        slow = pool._copy

        def copy(*given: Any) -> Any:  # as long as a large adapter takes
            time.sleep(0.15)
            return slow(*given)

        pool._copy = copy  # type: ignore[method-assign]
        adapter = await pool.get("one")
        await growing
        return adapter

    adapter = asyncio.run(ask_while_it_grows())
    assert (adapter.folder / "adapter_model.safetensors").read_bytes() == whole
    assert len(engine.loads) == 1


def test_an_adapter_that_is_taken_away_is_unknown_and_may_come_back(
    adapter_root: Path, two_versions: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    shutil.rmtree(adapter_root / "one")
    with pytest.raises(UnknownAdapterError, match="adapter one: does not exist"):
        asyncio.run(pool.get("one"))
    shutil.copytree(two_versions / "v1", adapter_root / "one")
    assert asyncio.run(pool.get("one")) is first
    assert len(engine.loads) == 1


def test_a_copy_that_something_tidied_away_is_made_again(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path
) -> None:
    pool, _ = pool_of(adapter_root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    shutil.rmtree(tmp_path / "copies")
    assert asyncio.run(pool.get("one")).version == first.version
    assert (first.folder / "adapter_model.safetensors").is_file()


def test_copies_of_versions_out_of_use_are_deleted(
    adapter_root: Path, two_versions: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    old = asyncio.run(pool.get("one"))
    engine.running = {old.engine_name}
    replace_adapter(adapter_root / "one", two_versions / "v2")
    new = asyncio.run(pool.get("one"))
    monkeypatch.setattr(adapters_module, "IDLE_S", 0.0)
    asyncio.run(pool.get("two"))  # any load looks around
    assert old.folder.exists()  # a request still runs on it
    engine.running = set()
    asyncio.run(pool.unload("two"))
    assert not old.folder.exists()
    assert old.engine_id not in engine.held
    assert new.folder.exists()  # the engine holds it
    engine.held.clear()  # the engine dropped it for others
    asyncio.run(pool.unload("two"))
    assert not new.folder.exists()
    assert asyncio.run(pool.get("one")).version == new.version


def test_a_root_that_does_not_answer_leaves_what_is_loaded(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, _ = pool_of(adapter_root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))

    def unplugged(*_: Any) -> Any:
        raise OSError("Transport endpoint is not connected")

    monkeypatch.setattr("raylm.serving.adapter_root.LocalFiles.fingerprint", unplugged)
    assert asyncio.run(pool.get("one")) is first
    with pytest.raises(ServingError, match="adapter two: cannot be read: Transport endpoint"):
        asyncio.run(pool.get("two"))


def test_unknown_names_cost_one_listing_and_no_memory(
    adapter_root: Path, served_model_dir: Path, tmp_path: Path
) -> None:
    pool, _ = pool_of(adapter_root, tmp_path, served_model_dir)
    listings = 0
    names = pool.root.names

    def counted() -> Any:
        nonlocal listings
        listings += 1
        return names()

    pool.root.names = counted  # type: ignore[method-assign]
    for number in range(200):
        with pytest.raises(UnknownAdapterError):
            asyncio.run(pool.get(f"nobody-{number}"))
    assert listings == 1
    assert not pool._entries
