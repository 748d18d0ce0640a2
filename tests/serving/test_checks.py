"""What is refused before anything heavy starts."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import serve

from raylm.config.load import load_config
from raylm.config.serving import ServeArgs, ServeConfig
from raylm.errors import ClusterError, ConfigError, ModelError, ServingError
from raylm.serving.app import _engine_options, replica_environment
from raylm.serving.checks import (
    check_draft,
    check_model,
    check_port,
    check_resources,
    largest_node,
    replica_gpus,
    warn_of_remote_code,
    warn_without_chat_template,
)
from raylm.serving.endpoint import engine_reason
from raylm.serving.engine_args import command_line
from raylm.serving.processes import no_process_left
from raylm.serving.proxy import choose_proxy, controller_environment
from raylm.serving.relay import EngineReplica


def write_model(folder: Path, *, template: bool = True, **config: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 256, **config}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"} if template else {}))
    return str(folder)


def test_a_length_above_the_limit_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    assert check_model(ServeArgs(model=model, max_model_len=256)) == model
    with pytest.raises(ServingError, match="257 is above the model's limit of 256 tokens"):
        check_model(ServeArgs(model=model, max_model_len=257))


def test_with_rope_scaling_the_limit_is_left_to_vllm(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    check_model(ServeArgs(model=model, max_model_len=1024))


def test_a_tokenizer_without_chat_template_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_model(tmp_path / "m", template=False)
    with caplog.at_level(logging.WARNING):
        warn_without_chat_template(ServeArgs(model=model))
    assert "has no chat template" in caplog.text
    caplog.clear()
    warn_without_chat_template(ServeArgs(model=model, engine={"chat_template": "t.jinja"}))
    assert caplog.text == ""


def test_code_of_the_model_runs_only_when_asked_for_and_then_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Known fault Z04."""
    for engine, said in (({}, False), ({"trust_remote_code": False}, False), ({"trust_remote_code": True}, True)):
        caplog.clear()
        warn_of_remote_code(ServeArgs(model="m", engine=engine))
        assert ("engine.trust_remote_code is on" in caplog.text) is said
    words = command_line(ServeArgs(model="m"), "m", on_cpu=True, native_bf16=True)
    assert "--trust-remote-code" not in words  # vLLM's default is off


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="holds a LoRA adapter"):
        check_model(ServeArgs(model=str(tmp_path)))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent: there is no such file or folder"):
        check_model(ServeArgs(model=str(tmp_path / "absent")))


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert check_model(ServeArgs(model="./m")) == model


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServingError, match=f"127.0.0.1:{port}: cannot be listened on: Address already in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_replicas_must_fit_the_cluster() -> None:
    check_resources([ServeArgs(model="m", num_replicas=2)], {"CPU": 2.0})
    with pytest.raises(ClusterError, match="3 replicas of 1 CPUs need 3, the cluster has 2"):
        check_resources([ServeArgs(model="m", num_replicas=3)], {"CPU": 2.0})
    with pytest.raises(ClusterError, match="1 replicas of 1 GPUs need 1, the cluster has 0"):
        check_resources([ServeArgs(model="m", num_gpus=1)], {"CPU": 2.0})
    with pytest.raises(ClusterError, match="1 replicas of 1 CPUs and 2 replicas of 1 CPUs need 3, the cluster has 2"):
        check_resources([ServeArgs(model="m"), ServeArgs(model="n", num_replicas=2)], {"CPU": 2.0})
    check_resources([ServeArgs(model="m", num_replicas=(0, 8)), ServeArgs(model="n")], {"CPU": 2.0})


def test_a_replica_must_fit_a_node_unless_its_ranks_are_actors() -> None:
    nodes = [
        {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}
        for alive, cpus, gpus in ((True, 8.0, 4.0), (True, 2.0, 8.0), (False, 99.0, 99.0))
    ]
    largest = largest_node(nodes)
    assert largest == {"CPU": 8.0, "GPU": 8.0}
    there = {"CPU": 10.0, "GPU": 12.0}
    check_resources([ServeArgs(model="m", engine={"tensor_parallel_size": 8})], there, largest)
    wide: dict[str, Any] = {"tensor_parallel_size": 6, "pipeline_parallel_size": 2}
    with pytest.raises(ClusterError, match=r"a replica takes 12 GPUs, and no node has more than 8.*backend=ray"):
        check_resources([ServeArgs(model="m", engine=wide)], there, largest)
    spread = ServeArgs(model="m", num_cpus=3, engine={**wide, "distributed_executor_backend": "ray"})
    check_resources([spread], there, largest)
    options = serve.deployment(EngineReplica, **_engine_options(spread, there))._replica_config  # type: ignore[attr-defined]
    assert options.placement_group_bundles == [{"CPU": 3, "GPU": 1}, *[{"GPU": 1}] * 11]
    assert options.placement_group_strategy == "PACK"
    assert options.ray_actor_options["num_gpus"] == 0  # the ranks have them
    assert "placement_group_bundles" not in _engine_options(spread, {"CPU": 10.0})


def test_gpus_follow_the_cluster_and_the_tensor_parallel_size() -> None:
    assert replica_gpus(ServeArgs(model="m"), {"CPU": 2.0}) == 0.0
    assert replica_gpus(ServeArgs(model="m"), {"GPU": 8.0}) == 1.0
    assert replica_gpus(ServeArgs(model="m", engine={"tensor_parallel_size": 4}), {"GPU": 8.0}) == 4.0
    both = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    assert replica_gpus(ServeArgs(model="m", engine=both), {"GPU": 8.0}) == 6.0
    assert replica_gpus(ServeArgs(model="m", num_gpus=0.5), {"GPU": 8.0}) == 0.5


def test_several_replicas_do_not_bind_to_the_same_cores() -> None:
    private = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    assert replica_environment(ServeArgs(model="m"), on_cpu=False) == private
    alone = replica_environment(ServeArgs(model="m"), on_cpu=True)
    assert alone["OMP_NUM_THREADS"] == str(os.cpu_count())
    several = replica_environment(ServeArgs(model="m", num_replicas=2, num_cpus=4), on_cpu=True)
    assert several == {**alone, "OMP_NUM_THREADS": "4"}
    assert several["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(
    ("proxy", "host", "num_nodes", "expected"),
    [
        ("auto", "127.0.0.1", 1, "haproxy"),
        ("auto", "127.0.0.1", 2, "python"),
        ("auto", "0.0.0.0", 2, "haproxy"),
        ("python", "127.0.0.1", 1, "python"),
    ],
)
def test_haproxy_stands_in_front_where_it_reaches_the_replicas(
    proxy: str, host: str, num_nodes: int, expected: str
) -> None:
    config = ServeConfig.model_validate({"model": "m", "proxy": proxy, "host": host})
    assert choose_proxy(config, num_nodes=num_nodes) == expected


def test_https_is_served_by_the_python_proxy() -> None:
    tls = {"tls_cert_file": "c", "tls_key_file": "k"}
    assert choose_proxy(ServeConfig.model_validate({"model": "m", **tls}), num_nodes=1) == "python"
    with pytest.raises(ConfigError, match="tls_cert_file and tls_key_file belong together"):
        load_config(ServeConfig, {"model": "m", "tls_cert_file": "c"})
    with pytest.raises(ConfigError, match="proxy=haproxy cannot serve HTTPS"):
        load_config(ServeConfig, {"model": "m", "proxy": "haproxy", **tls})


def test_each_haproxy_has_its_own_folder_and_ports() -> None:
    one, other = (controller_environment("haproxy", scratch) for scratch in ("/tmp/a", "/tmp/b"))
    assert one["RAY_SERVE_HAPROXY_SOCKET_PATH"] == "/tmp/a/admin.sock"
    ports = [e[f"RAY_SERVE_HAPROXY_{kind}_PORT"] for e in (one, other) for kind in ("METRICS", "STATS")]
    assert len(set(ports)) == 4
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in controller_environment("python", "/tmp/a")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "The deployment failed to start 1 times in a row.\nTraceback\nraylm.errors.ServingError: "
            "/m: the engine did not start: ValueError: no memory\n",
            "the engine did not start: ValueError: no memory",
        ),
        ("Traceback (most recent call last):\n  File x\nImportError: no vllm\n\n", "ImportError: no vllm"),
        ("", "the deployment failed."),
    ],
)
def test_one_line_says_why_the_engine_failed(message: str, expected: str) -> None:
    assert engine_reason(message) == expected


def test_a_process_that_outlives_its_parent_is_ended_by_its_id() -> None:
    command = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    with no_process_left() as descendants, descendants.noted():
        parent = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
    assert orphan.is_running()  # its parent is still there: it is none of ours to end
    with no_process_left() as descendants:
        with descendants.noted():
            other = subprocess.Popen(
                [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert other.stdout is not None
            late = psutil.Process(int(other.stdout.readline()))
        other.kill()
        other.wait()
    assert not late.is_running() or late.status() == psutil.STATUS_ZOMBIE
    assert orphan.is_running()
    orphan.kill()
    parent.communicate()
    other.communicate()


def test_a_draft_is_checked_and_made_absolute_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, head = (write_model(tmp_path / name, hidden_size=8, vocab_size=5) for name in ("m", "d"))
    args = ServeArgs.model_validate({"model": model, "speculation": {"method": "draft_model", "model": "./d"}})
    monkeypatch.chdir(tmp_path)
    found = check_draft(args, use_gpu=False)
    assert found is not None
    assert found.model == head
    assert check_draft(ServeArgs(model=model), use_gpu=False) is None
    (tmp_path / "d" / "config.json").write_text(json.dumps({"vocab_size": 6}))
    with pytest.raises(ModelError, match="has 6 rows and"):
        check_draft(args, use_gpu=False)
