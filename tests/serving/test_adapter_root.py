"""Which files a name leads to, in a folder and in a bucket (known fault Z04)."""

import asyncio
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.config.serving import ServeArgs
from raylm.errors import ModelError
from raylm.models.adapter_files import linear_shapes
from raylm.serving.adapter_root import LocalRoot, open_root, open_single
from raylm.serving.adapter_survey import resolve_adapters
from raylm.serving.adapters import AdapterPool, UnknownAdapterError
from tests.serving.adapter_support import CountingEngine, only_pickle, pool_of

HOSTILE = [
    "..",
    ".",
    "",
    "/",
    "../secret",
    "one/../../secret",
    "/etc",
    "one/",
    "..\\secret",
    "one\0",
    "linked",
    "%2e%2e",
]


@pytest.fixture(scope="module")
def guarded(two_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root beside an adapter that it must not give away, with links to it."""
    folder = tmp_path_factory.mktemp("guarded")
    shutil.copytree(two_versions / "v1", folder / "secret")
    shutil.copytree(two_versions / "v1", folder / "root" / "one")
    shutil.copytree(two_versions / "v1", folder / "root" / "weights-out")
    (folder / "root" / "weights-out" / "adapter_model.safetensors").unlink()
    (folder / "root" / "weights-out" / "adapter_model.safetensors").symlink_to(
        folder / "secret" / "adapter_model.safetensors"
    )
    (folder / "root" / "linked").symlink_to(folder / "secret")
    (folder / "root" / "inner").symlink_to(folder / "root" / "one")
    return folder


pieces = st.sampled_from([*"./\\~%:0", "..", "one", "secret", "linked", "root", "\0", "é"])
words = st.lists(pieces, max_size=8).map("".join)


@given(st.one_of(st.text(max_size=40), words, st.sampled_from(HOSTILE)))
def test_no_name_reaches_a_file_outside_the_root(guarded: Path, name: str) -> None:
    """Z04 and the rule of names: whatever a client sends, only adapters below the root are opened."""
    root = LocalRoot(guarded / "root")
    files = root.files(name)
    if files is None:
        return
    assert "/" not in name
    assert name not in (".", "..")
    try:
        stream = files.open("adapter_model.safetensors")
    except (ModelError, OSError):
        return
    with stream:
        assert Path(os.readlink(f"/proc/self/fd/{stream.fileno()}")).is_relative_to((guarded / "root").resolve())


@pytest.mark.parametrize("name", [*HOSTILE, "secret", "weights-out"])
def test_no_request_loads_what_lies_outside(guarded: Path, served_model_dir: Path, tmp_path: Path, name: str) -> None:
    pool, engine = pool_of(guarded / "root", tmp_path, served_model_dir)
    with pytest.raises((UnknownAdapterError, ModelError)):
        asyncio.run(pool.get(name))
    assert engine.loads == []


def test_links_within_the_root_are_followed(guarded: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, _ = pool_of(guarded / "root", tmp_path, served_model_dir)
    assert list(pool.root.names()) == ["inner", "one", "weights-out"]
    assert pool.root.ignored() == [("linked", "is a link that leads out of the root")]
    assert asyncio.run(pool.get("inner")).rank == 4


def test_a_pickle_is_never_read(adapter_root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    """Z04: beside safetensors it stays where it is; alone it is refused."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    (adapter_root / "one" / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    pool, engine = pool_of(adapter_root, tmp_path, served_model_dir)
    adapter = asyncio.run(pool.get("one"))
    assert sorted(file.name for file in adapter.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    only_pickle(adapter_root / "two")
    with pytest.raises(ModelError, match="adapter two: has weights in pickle format only"):
        asyncio.run(pool.get("two"))
    assert len(engine.loads) == 1
    assert not (tmp_path / "sprung").exists()


def test_a_single_adapter_may_be_links(two_versions: Path, tmp_path: Path) -> None:
    """As hubs keep them in their caches; no client's word leads there."""
    (tmp_path / "polite").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "polite" / file).symlink_to(two_versions / "v1" / file)
    files = open_single(str(tmp_path / "polite")).files("polite")
    assert files is not None
    assert files.fingerprint()
    assert open_single(str(tmp_path / "polite")).files("../polite") is None


def test_a_bucket_is_a_root(
    bucket: Any, two_versions: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        bucket.upload_file(str(two_versions / "v1" / file), f"roots/a/one/{file}")
        bucket.upload_file(str(two_versions / "v2" / file), f"roots/secret/{file}")
    root = open_root("s3://data/roots/a")
    assert list(root.names()) == ["one"]
    assert (
        resolve_adapters(ServeArgs(model=str(served_model_dir), adapters="s3://data/roots/a/"))["max_adapter_rank"] == 8
    )
    monkeypatch.setattr(type(root), "fresh_s", 0.0)
    engine = CountingEngine()
    pool = AdapterPool(root, engine, tmp_path / "copies", linear=linear_shapes(str(served_model_dir)), max_rank=16)
    first = asyncio.run(pool.get("one"))
    assert asyncio.run(pool.get("one")) is first
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        bucket.upload_file(str(two_versions / "v2" / file), f"roots/a/one/{file}")
    assert asyncio.run(pool.get("one")).rank == 12
    for name in ("../secret", "secret", "..", "one/../../secret"):
        with pytest.raises(UnknownAdapterError):
            asyncio.run(pool.get(name))
    single = open_single("s3://data/roots/secret")
    assert list(single.names()) == ["secret"]
    assert (
        resolve_adapters(ServeArgs(model=str(served_model_dir), adapter="s3://data/roots/secret"))["max_adapter_rank"]
        == 16
    )
