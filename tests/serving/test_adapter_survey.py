"""What a server with adapters is started with, and what stops it before that (known fault W09)."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from raylm.cli import main
from raylm.config.serving import ServeArgs
from raylm.errors import ConfigError, ModelError, ServingError
from raylm.models.adapter_files import servable_rank
from raylm.serving.adapter_survey import CPU_EXTENSION, engine_settings, resolve_adapters
from raylm.serving.engine_args import adapter_model, command_line
from tests.serving.adapter_support import edit_config


def test_room_is_made_for_the_highest_rank_that_is_there(adapter_root: Path, served_model_dir: Path) -> None:
    args = ServeArgs(model=str(served_model_dir), adapters=str(adapter_root))
    assert resolve_adapters(args) == {"adapter": None, "adapters": str(adapter_root), "max_adapter_rank": 16}
    shutil.rmtree(adapter_root / "two")
    assert resolve_adapters(args)["max_adapter_rank"] == 8
    shutil.rmtree(adapter_root / "one")
    assert resolve_adapters(args)["max_adapter_rank"] == 64
    assert [servable_rank(rank) for rank in (1, 2, 65, 512, 513)] == [1, 8, 128, 512, None]


def test_a_refused_adapter_is_a_warning_and_the_others_go_on(
    adapter_root: Path, served_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(use_dora=True)(adapter_root / "one")
    shutil.copytree(adapter_root / "two", adapter_root / "not a name")
    args = ServeArgs(model=str(served_model_dir), adapters=str(adapter_root), max_adapter_rank=8)
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
    served_model_dir: Path,
    two_versions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    folder = shutil.copytree(two_versions / "v1", tmp_path / "polite")
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
