"""Adapters without an engine: names, checks, versions (known faults W08, W09, Z04)."""

import asyncio
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.cli import main
from raylm.config import GenerateConfig
from raylm.config.serving import ServeArgs
from raylm.errors import ConfigError, ModelError, ServingError
from raylm.inference.generate import run_generation
from raylm.models.adapter_files import check_folder, linear_shapes, servable_rank
from raylm.serving import adapters as adapters_module
from raylm.serving.adapter_root import LocalRoot, open_root, open_single
from raylm.serving.adapter_survey import CPU_EXTENSION, engine_settings, resolve_adapters
from raylm.serving.adapters import AdapterPool, UnknownAdapterError
from raylm.serving.engine_args import adapter_model, command_line
from tests.serving.adapter_support import CountingEngine, build_adapter, replace_adapter


@pytest.fixture(scope="module")
def made(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of one adapter, of ranks 4 and 12."""
    folder = tmp_path_factory.mktemp("made")
    build_adapter(folder / "v1", served_model_dir, seed=1)
    build_adapter(folder / "v2", served_model_dir, seed=2, r=12)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A root with the adapters `one` and `two`."""
    shutil.copytree(made / "v1", tmp_path / "root" / "one")
    shutil.copytree(made / "v2", tmp_path / "root" / "two")
    return tmp_path / "root"


def pool_of(root: Path, tmp_path: Path, model: Path, *, max_rank: int = 16) -> tuple[AdapterPool, CountingEngine]:
    engine = CountingEngine()
    shapes = linear_shapes(str(model))
    return AdapterPool(LocalRoot(root), engine, tmp_path / "copies", linear=shapes, max_rank=max_rank), engine


# ---- what is refused


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    return run


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = FIRST.replace("lora_A", "lora_B")


def add(name: str, *shape: int) -> Callable[[Path], None]:
    import torch

    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))


def narrow(tensors: dict[str, Any]) -> None:
    """Smaller than the base's: vLLM would copy it into a corner of its buffer."""
    tensors[FIRST] = tensors[FIRST][:, :64]


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


REFUSED = [
    ("dora", edit_config(use_dora=True), "uses DoRA.*raylm adapter merge"),
    ("saved", edit_config(modules_to_save=["lm_head"]), "holds whole modules.*raylm adapter merge"),
    ("rows", edit_config(trainable_token_indices=[320, 321]), "holds rows of new tokens.*raylm adapter merge"),
    ("bias", edit_config(bias="lora_only"), r"has biases \(bias=lora_only\).*raylm adapter merge"),
    ("lora-bias", edit_config(lora_bias=True), r"has biases \(lora_bias\)"),
    ("pissa", edit_config(init_lora_weights="pissa"), "init_lora_weights=pissa changed the base's weights"),
    ("kind", edit_config(peft_type="LOHA"), "is of PEFT type LOHA"),
    ("embedding", add("base_model.model.model.embed_tokens.weight", 320, 128), "holds .*embed_tokens.weight, which"),
    ("head", add("base_model.model.lm_head.lora_A.weight", 4, 128), "one of the two matrices of lm_head"),
    ("deeper", add(FIRST.replace("layers.0", "layers.7"), 4, 128), "one of the two matrices of model.layers.7"),
    ("narrow", edit_tensors(narrow), "was made for a model.layers.0.self_attn.q_proj of 128 x 64, the base's is 128 x"),
    ("empty", add(FIRST, 0), r"shapes \(0,\) and"),
    ("half", edit_tensors(lambda tensors: tensors.pop(FIRST_B)), "has one of the two matrices of model.layers.0"),
    ("rank", edit_config(r=8), "have the ranks 4 and 4, adapter_config.json says 8"),
    ("huge", edit_config(r=1024, rank_pattern={".*": 4}), None),  # the pattern holds for all modules
    ("pickle", only_pickle, "pickle format only.*Save it as safetensors"),
    ("torn", truncate, "is not a whole safetensors file"),
    ("config", lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not a JSON object"),
]


@pytest.mark.parametrize(("edit", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_vllm_cannot_serve_is_refused_with_the_remedy(
    made: Path, served_model_dir: Path, tmp_path: Path, edit: Callable[[Path], None], message: str | None
) -> None:
    folder = shutil.copytree(made / "v1", tmp_path / "a")
    assert check_folder(str(folder), str(served_model_dir)) == 4
    edit(folder)
    if message is None:
        assert check_folder(str(folder), str(served_model_dir)) == 4
        return
    with pytest.raises(ModelError, match=message):
        check_folder(str(folder), str(served_model_dir))
    with pytest.raises(ModelError, match=message):  # the whole server, before anything starts
        resolve_adapters(ServeArgs(model=str(served_model_dir), adapter=str(folder)))
    with pytest.raises(ModelError, match=message):
        run_generation(
            GenerateConfig(
                model=str(served_model_dir), adapter=str(folder), prompts=("x",), output=str(tmp_path / "out.jsonl")
            )
        )


@pytest.mark.parametrize("key", ["use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication"])
def test_vllm_refuses_the_same_features_but_when_it_loads(made: Path, key: str) -> None:
    """Our table stands in for vLLM's check, which needs an engine: when vLLM learns one, this fails."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    config = json.loads((made / "v1" / "adapter_config.json").read_text())
    PEFTHelper.from_dict(config).validate_legal(LoRAConfig(max_lora_rank=16))
    with pytest.raises(ValueError, match="support"):
        PEFTHelper.from_dict({**config, key: [1]}).validate_legal(LoRAConfig(max_lora_rank=16))


def test_an_adapter_of_another_base_is_refused(served_model_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = build_adapter(tmp_path / "small", tiny_model_dir, seed=1)
    with pytest.raises(ModelError, match=f"of 32 x 64, the base's is 128 x 64. .*{tiny_model_dir}"):
        check_folder(str(folder), str(served_model_dir))


def test_an_adapter_of_the_output_layer_is_refused(made: Path, served_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "v1", tmp_path / "head")
    add("base_model.model.lm_head.lora_A.weight", 4, 128)(folder)
    add("base_model.model.lm_head.lora_B.weight", 320, 4)(folder)
    with pytest.raises(ModelError, match="adapts lm_head, which is no linear module of the base, or its output layer"):
        check_folder(str(folder), str(served_model_dir))


def test_ranks_and_patterns_of_peft_are_understood(served_model_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}}
    folder = build_adapter(tmp_path / "p", served_model_dir, seed=1, use_rslora=True, **options)
    assert check_folder(str(folder), str(served_model_dir)) == 9


# ---- what the server is started with


def test_room_is_made_for_the_highest_rank_that_is_there(root: Path, served_model_dir: Path) -> None:
    args = ServeArgs(model=str(served_model_dir), adapters=str(root))
    assert resolve_adapters(args) == {"adapter": None, "adapters": str(root), "max_adapter_rank": 16}
    shutil.rmtree(root / "two")
    assert resolve_adapters(args)["max_adapter_rank"] == 8
    shutil.rmtree(root / "one")
    assert resolve_adapters(args)["max_adapter_rank"] == 64
    assert [servable_rank(rank) for rank in (1, 2, 65, 512, 513)] == [1, 8, 128, 512, None]


def test_a_refused_adapter_is_a_warning_and_the_others_go_on(
    root: Path, served_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(use_dora=True)(root / "one")
    shutil.copytree(root / "two", root / "not a name")
    args = ServeArgs(model=str(served_model_dir), adapters=str(root), max_adapter_rank=8)
    with caplog.at_level(logging.WARNING):
        assert resolve_adapters(args)["max_adapter_rank"] == 8
    assert "adapter one: uses DoRA" in caplog.text
    assert "adapter two: its rank 12 is above the 8 that the server was started with" in caplog.text
    assert "adapter 'not a name' has a name that is not letters" in caplog.text


def test_the_engine_is_told_ranks_and_numbers(served_model_dir: Path) -> None:
    args = ServeArgs(model="/m", adapters="/a", max_adapters=3, max_adapter_rank=12)
    settings = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": 16}
    assert engine_settings(args, on_cpu=False) == settings
    assert engine_settings(args, on_cpu=True) == {**settings, "worker_extension_cls": CPU_EXTENSION}
    words = command_line(args, "/m", on_cpu=False, native_bf16=False)
    assert words[-7:] == ["--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-lora-rank", "16"]
    assert engine_settings(ServeArgs(model="/m", adapter="/a", max_adapter_rank=8), on_cpu=False)["max_loras"] == 2
    assert engine_settings(ServeArgs(model="/m"), on_cpu=True) == {}


MIXED = """
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

torch.manual_seed(0)
wrapper = PunicaWrapperCPU(64, max_batches=8, device="cpu")
x, a, b = torch.randn(6, 16), torch.randn(2, 1, 4, 16), torch.randn(2, 1, 16, 4)
rows = (0, 0, 7, 7, 9, 0)  # the adapters 7 and 9 lie in the slots 0 and 1; 0 is the base
wanted = torch.zeros(6, 16)
for row, slot in ((2, 0), (3, 0), (4, 1)):
    wanted[row] = x[row] @ a[slot, 0].T @ b[slot, 0].T

def is_right(is_prefill):
    wrapper.update_metadata(LoRAMapping(rows, rows, is_prefill=is_prefill), [7, 9], 3, 320)
    y = torch.zeros(6, 16)
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
    return torch.allclose(y, wanted, atol=1e-4)

print([is_right(True), is_right(False)])
import raylm.serving.cpu_adapters
print([is_right(True), is_right(False)])
"""


@pytest.fixture(scope="module")
def mixed_batch() -> list[str]:
    """Whether vLLM's own kernels for processors keep base rows apart: as they come, and corrected."""
    done = subprocess.run([sys.executable, "-c", MIXED], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


def test_base_rows_of_a_mixed_batch_get_no_adapter(mixed_batch: list[str]) -> None:
    assert mixed_batch[1] == "[True, True]"


def test_vllm_still_needs_the_correction(mixed_batch: list[str]) -> None:
    """When this fails, drop raylm/serving/cpu_adapters.py."""
    assert mixed_batch[0] == "[False, False]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": "/absent/root"}, "adapters /absent/root: cannot be listed"),
        ({"adapters": "https://h/x"}, "read from folders and object storage"),
        ({"adapter": "hf://h/x"}, "read from folders and object storage"),
        ({"adapter": "/absent/adapter"}, "/absent/adapter: has no adapter_config.json"),
        ({"adapter": "/absent/not a name"}, "must be letters, digits"),
        ({"adapter": "/a", "engine": {"enable_lora": True}}, "engine.enable_lora: excludes adapter"),
        ({"adapter": "/a", "engine": {"lora_modules": ["x=/y"]}}, "engine.lora_modules: excludes adapter"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_starts(
    served_model_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ModelError, ServingError, ConfigError), match=message):
        resolve_adapters(ServeArgs(model=str(served_model_dir), **settings))


@pytest.mark.parametrize("command", [("serve",), ("chat",), ("generate", "hello")])
def test_the_commands_refuse_a_wrong_adapter_before_anything_starts(
    served_model_dir: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    folder = shutil.copytree(made / "v1", tmp_path / "polite")
    edit_config(use_dora=True)(folder)
    assert main([command[0], str(served_model_dir), *command[1:], "--adapter", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}: uses DoRA, which vLLM does not serve. Merge it")


def test_one_adapter_or_a_root() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        ServeArgs(model="m", adapter="/a", adapters="/b")


def test_a_single_adapter_is_asked_for_by_the_last_part_of_its_path() -> None:
    assert adapter_model(ServeArgs(model="/runs/m", adapter="runs/sft/polite/")) == "m:polite"
    assert adapter_model(ServeArgs(model="/runs/m", name="x", adapter="s3://b/k/polite")) == "x:polite"
    assert adapter_model(ServeArgs(model="/runs/m")) is None


# ---- names


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
def guarded(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root beside an adapter that it must not give away, with links to it."""
    folder = tmp_path_factory.mktemp("guarded")
    shutil.copytree(made / "v1", folder / "secret")
    shutil.copytree(made / "v1", folder / "root" / "one")
    shutil.copytree(made / "v1", folder / "root" / "weights-out")
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


def test_a_pickle_is_never_read(root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    """Z04: beside safetensors it stays where it is; alone it is refused."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    (root / "one" / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    adapter = asyncio.run(pool.get("one"))
    assert sorted(file.name for file in adapter.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    only_pickle(root / "two")
    with pytest.raises(ModelError, match="adapter two: has weights in pickle format only"):
        asyncio.run(pool.get("two"))
    assert len(engine.loads) == 1
    assert not (tmp_path / "sprung").exists()


# ---- versions


def test_requests_that_come_together_load_once(root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, engine = pool_of(root, tmp_path, served_model_dir)

    async def together() -> list[Any]:
        return await asyncio.gather(*(pool.get("one") for _ in range(20)))

    assert len({adapter.version for adapter in asyncio.run(together())}) == 1
    assert [engine_id for _, engine_id in engine.loads] == [1]


def test_new_files_are_a_new_version_under_a_new_id(
    root: Path, made: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W08: neither an engine id, nor the name and path that key cached blocks, ever stand for two versions."""
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    replace_adapter(root / "one", made / "v2")
    second = asyncio.run(pool.get("one"))
    assert (first.version, first.rank, second.rank) != (second.version, 4, 4)
    assert first.engine_id != second.engine_id
    assert first.engine_name != second.engine_name
    assert first.folder != second.folder
    assert (first.folder / "adapter_model.safetensors").read_bytes() == (
        made / "v1" / "adapter_model.safetensors"
    ).read_bytes()
    replace_adapter(root / "one", made / "v1")
    assert asyncio.run(pool.get("one")) is first  # the same weights: one id for one version, never two
    assert len(engine.loads) == 2


def test_files_are_looked_at_once_in_a_second_whoever_asks(
    root: Path, made: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 60.0)
    pool, _ = pool_of(root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    replace_adapter(root / "one", made / "v2")
    assert asyncio.run(pool.get("one")) is first
    assert asyncio.run(pool.get("one", force=True)).rank == 12  # what the reload route does


def test_the_version_is_that_of_the_files_whatever_the_copy(root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    shutil.copytree(root / "one", root / "again")
    first, again = asyncio.run(pool.get("one")), asyncio.run(pool.get("again"))
    assert first.version == again.version
    assert len({name for name, _ in engine.loads}) == 2
    os.utime(root / "one" / "adapter_config.json")
    assert asyncio.run(pool.get("one", force=True)) is first


def test_what_a_cancelled_request_began_is_kept_for_the_next(
    root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Path] = []
    copy = adapters_module.copy_hashed

    def slow_copy(files: Any, folder: Path) -> str:
        copies.append(folder)
        time.sleep(0.3)
        return copy(files, folder)

    monkeypatch.setattr(adapters_module, "copy_hashed", slow_copy)

    async def steps() -> None:
        pool, engine = pool_of(root, tmp_path, served_model_dir)
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
    root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    edit_config(use_dora=True)(root / "one")
    assert asyncio.run(pool.get("one")) is first
    with pytest.raises(ModelError, match="uses DoRA"):
        asyncio.run(pool.load("one", force=True))
    one, two = asyncio.run(pool.rows())
    assert (one["version"], one["loaded"]) == (first.version, True)
    assert "uses DoRA" in one["error"]
    assert (two["rank"], two["loaded"], two["error"], two["last_used"]) == (12, False, None, None)
    edit_config(use_dora=False)(root / "one")
    assert asyncio.run(pool.get("one")).rank == 4
    assert asyncio.run(pool.rows())[0]["error"] is None
    assert len(engine.loads) <= 2


def test_a_refused_adapter_is_read_once_until_its_files_change(
    root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    edit_config(use_dora=True)(root / "one")
    reads = []
    whole = pool._copy
    monkeypatch.setattr(pool, "_copy", lambda *given: reads.append(1) or whole(*given))
    for _ in range(3):
        with pytest.raises(ModelError, match="uses DoRA"):
            asyncio.run(pool.get("one"))
    assert len(reads) == 1
    edit_config(use_dora=False)(root / "one")
    assert asyncio.run(pool.get("one")).rank == 4
    assert len(engine.loads) == 1


def test_files_that_are_being_written_are_waited_for(root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    weights = root / "one" / "adapter_model.safetensors"
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


def test_a_single_adapter_may_be_links(made: Path, tmp_path: Path) -> None:
    """As hubs keep them in their caches; no client's word leads there."""
    (tmp_path / "polite").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "polite" / file).symlink_to(made / "v1" / file)
    files = open_single(str(tmp_path / "polite")).files("polite")
    assert files is not None
    assert files.fingerprint()
    assert open_single(str(tmp_path / "polite")).files("../polite") is None


def test_an_adapter_that_is_taken_away_is_unknown_and_may_come_back(
    root: Path, made: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    shutil.rmtree(root / "one")
    with pytest.raises(UnknownAdapterError, match="adapter one: does not exist"):
        asyncio.run(pool.get("one"))
    shutil.copytree(made / "v1", root / "one")
    assert asyncio.run(pool.get("one")) is first
    assert len(engine.loads) == 1


def test_a_copy_that_something_tidied_away_is_made_again(root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, _ = pool_of(root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))
    shutil.rmtree(tmp_path / "copies")
    assert asyncio.run(pool.get("one")).version == first.version
    assert (first.folder / "adapter_model.safetensors").is_file()


def test_copies_of_versions_out_of_use_are_deleted(
    root: Path, made: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, engine = pool_of(root, tmp_path, served_model_dir)
    old = asyncio.run(pool.get("one"))
    engine.running = {old.engine_name}
    replace_adapter(root / "one", made / "v2")
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
    root: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRoot, "fresh_s", 0.0)
    pool, _ = pool_of(root, tmp_path, served_model_dir)
    first = asyncio.run(pool.get("one"))

    def unplugged(*_: Any) -> Any:
        raise OSError("Transport endpoint is not connected")

    monkeypatch.setattr("raylm.serving.adapter_root.LocalFiles.fingerprint", unplugged)
    assert asyncio.run(pool.get("one")) is first
    with pytest.raises(ServingError, match="adapter two: cannot be read: Transport endpoint"):
        asyncio.run(pool.get("two"))


def test_unknown_names_cost_one_listing_and_no_memory(root: Path, served_model_dir: Path, tmp_path: Path) -> None:
    pool, _ = pool_of(root, tmp_path, served_model_dir)
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


# ---- object storage


def test_a_bucket_is_a_root(
    bucket: Any, made: Path, served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        bucket.upload_file(str(made / "v1" / file), f"roots/a/one/{file}")
        bucket.upload_file(str(made / "v2" / file), f"roots/secret/{file}")
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
        bucket.upload_file(str(made / "v2" / file), f"roots/a/one/{file}")
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
