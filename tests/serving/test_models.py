"""Several models in one configuration: names, defaults, and when a gateway is needed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylm.config.load import load_config
from raylm.config.serving import ServeArgs, ServeConfig
from raylm.errors import ConfigError, ModelError
from raylm.serving.app import checked_models
from raylm.serving.engine_args import command_line
from raylm.serving.models import deployment_name, models_of, names_of, needs_gateway
from raylm.serving.version import fingerprint


def args(*models: dict[str, Any], **shared: Any) -> ServeArgs:
    return ServeArgs.model_validate({"models": list(models), **shared})


def test_one_model_is_a_list_of_itself_under_its_name() -> None:
    [model] = models_of(ServeConfig(model="org/m", port=1, kv_cache_gib=2))
    assert (type(model), model.name, model.kv_cache_gib) == (ServeArgs, "m", 2)


def test_keys_beside_the_list_are_defaults_of_its_entries() -> None:
    own = {"model": "b", "kv_cache_gib": 3, "engine": {"seed": 2}}
    shared: dict[str, Any] = {"kv_cache_gib": 2, "engine": {"seed": 1, "stream_interval": 4}}
    first, second = models_of(args({"model": "a"}, own, **shared))
    assert (first.kv_cache_gib, first.engine) == (2, {"seed": 1, "stream_interval": 4})
    assert (second.kv_cache_gib, second.engine) == (3, {"seed": 2, "stream_interval": 4})


def test_an_entrys_own_adapters_replace_the_shared_ones() -> None:
    first, second = models_of(args({"model": "a", "adapter": "/x"}, {"model": "b"}, adapters="/all"))
    assert (first.adapter, first.adapters) == ("/x", None)
    assert (second.adapter, second.adapters) == (None, "/all")


def test_an_entry_that_does_not_fit_to_its_defaults_is_named() -> None:
    entries = [{"model": "a"}, {"model": "b", "tool_parser": "hermes"}]
    with pytest.raises(ConfigError, match=r"models.1: .*tool_parser excludes engine.tool_call_parser"):
        models_of(args(*entries, engine={"tool_call_parser": "llama3_json"}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model is missing"),
        ({"model": "a", "models": [{"model": "b"}]}, "exclude each other"),
        ({"models": [{"model": "a"}], "name": "x"}, "belong to one model"),
        ({"models": [{"name": "a"}]}, "models.0.model is missing"),
        ({"models": [{"model": "a", "port": 1}]}, "unknown key models.0.port"),
        ({"models": [{"model": "a", "api_key_file": "f"}]}, "unknown key models.0.api_key_file"),
        ({"model": "a", "num_replicas": [3, 1]}, "the first is the smaller one"),
        ({"model": "a", "num_replicas": [0, 0]}, "num_replicas"),
        ({"model": "a", "routing": "random"}, "routing"),
    ],
)
def test_what_does_not_fit_together_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ServeConfig, config)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"model": "x/a"}, {"model": "y/a"}], r"models.1: the name 'a' is that of models.0"),
        ([{"model": "a"}, {"model": "b", "aliases": ["a"]}], r"models.1: the name 'a' is that of models.0"),
        ([{"model": "a", "aliases": ["c", "c"]}], r"models.0: the name 'c' is that of models.0"),
        ([{"model": "a", "name": "a/b"}, {"model": "b", "name": "a-b"}], r"models.1: the name 'a-b' is too like"),
    ],
)
def test_a_name_that_is_there_twice_is_refused(models: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models_of(args(*models))


def test_an_alias_like_the_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="aliases: the name 'm'"):
        models_of(ServeArgs(model="org/m", aliases=["m"]))


def test_the_faulty_entry_is_named(served_model_dir: Path, tmp_path: Path) -> None:
    good = {"model": str(served_model_dir), "name": "good"}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"models.1 \(adapter\): .*LoRA adapter"):
        checked_models(args(good, {"model": str(adapter)}))
    with pytest.raises(ModelError, match=r"models.1 \(missing\): .*no such file"):
        checked_models(args(good, {"model": str(tmp_path / "missing")}))
    with pytest.raises(ConfigError, match=r"models.0 \(good\): engine.api-key"):
        checked_models(args({**good, "engine": {"api-key": "x"}}))


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({"model": "a"}, False),
        ({"model": "a", "aliases": ["b"], "num_replicas": 2}, False),
        ({"models": [{"model": "a"}]}, False),
        ({"model": "a", "gateway": "always"}, True),
        ({"model": "a", "routing": "prefix"}, True),
        ({"model": "a", "num_replicas": [0, 2]}, True),
        ({"models": [{"model": "a"}, {"model": "b"}]}, True),
    ],
)
def test_a_gateway_is_there_when_it_is_needed(config: dict[str, Any], needed: bool) -> None:
    assert needs_gateway(ServeArgs.model_validate(config)) is needed


def test_no_gateway_where_one_is_needed_is_refused() -> None:
    with pytest.raises(ConfigError, match="gateway: is never, but several models needs one"):
        needs_gateway(args({"model": "a"}, {"model": "b"}, gateway="never"))


def test_aliases_are_served_names_of_the_engine() -> None:
    [model] = models_of(ServeArgs(model="org/m", aliases=["n", "o/p"]))
    assert names_of(model) == ["m", "n", "o/p"]
    words = command_line(model, "m", on_cpu=False, native_bf16=False)
    assert words[words.index("--served-model-name") :][:4] == ["--served-model-name", "m", "n", "o/p"]


def test_a_deployment_is_named_after_its_model() -> None:
    assert deployment_name(ServeArgs(model="m", name="org/m:1.5 b")) == "engine-org-m-1.5-b"


def test_a_version_follows_from_settings_and_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"1")
    first = fingerprint(ServeArgs(model=str(folder)))
    assert fingerprint(ServeArgs(model=str(folder), num_replicas=2, routing="prefix")) == first
    assert fingerprint(ServeArgs(model=str(folder), max_model_len=64)) != first
    weights.write_bytes(b"22")
    assert fingerprint(ServeArgs(model=str(folder))) != first


def test_the_files_of_a_drafter_and_of_a_template_count(served_model_dir: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(served_model_dir, tmp_path / "draft"))
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    model = ServeArgs.model_validate(
        {
            "model": str(served_model_dir),
            "speculation": {"method": "draft_model", "model": str(draft)},
            "engine": {"chat_template": str(template)},
        }
    )
    first = fingerprint(model)
    assert fingerprint(model) == first
    (draft / "more.json").write_text("{}")
    second = fingerprint(model)
    template.write_text("{{ messages[0] }}")
    assert len({first, second, fingerprint(model)}) == 3
    fingerprint(ServeArgs(model="m", engine={"chat_template": "{{ messages }}" * 1000}))  # a template, not a file


def test_the_shipped_yaml_of_two_models_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "serve" / "models.yaml").read_text()
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "raylm.serving:build_app"
    models = models_of(ServeArgs.model_validate(application.args))
    assert len(models) == 2
    assert sum(len(names_of(model)) for model in models) > 2
