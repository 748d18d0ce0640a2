"""Upgrades under load, on the Ray of the test session: what clients see while versions come, fail and go back."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from raylm.cli import main
from raylm.config.load import load_config
from raylm.config.serving import ServeConfig
from raylm.errors import ConfigError, ModelError, ServingError
from raylm.serving import delete, deploy_app, deployed, history, roll_back
from raylm.serving.app import checked_models
from raylm.serving.deploy import _alone, _leaving, _recorded_address
from raylm.serving.endpoint import _recordable
from raylm.serving.history import Revision, check_storable, prepared
from raylm.serving.proxy import tls_options
from tests.serving.adapter_support import build_adapter
from tests.serving.servers import free_port
from tests.tiny import build_tiny_model

PROMPT = [5, 6, 7, 8, 9]
TOKENS = 48


def test_no_secret_goes_into_the_store() -> None:
    for settings in ({"hf_token": "x"}, {"some_password": "x"}):
        with pytest.raises(ConfigError, match="is a secret"):
            check_storable(ServeConfig(model="m", engine=settings))
    with pytest.raises(ConfigError, match=r"models.0.engine.hf_token"):
        check_storable(load_config(ServeConfig, {"models": [{"model": "m", "engine": {"hf_token": "x"}}]}))
    nested = {"model_loader_extra_config": [{"aws_secret_access_key": "x"}]}
    with pytest.raises(ConfigError, match=r"engine.model_loader_extra_config.0.aws_secret_access_key"):
        check_storable(ServeConfig(model="m", engine=nested))
    check_storable(ServeConfig(model="m", engine={"max_num_batched_tokens": 64, "x": {"num_tokens": 1}}))
    names = {"tokenizer": "t", "skip_tokenizer_init": False, "hf_overrides": {"eos_token_id": 1, "stop_token_ids": [2]}}
    check_storable(ServeConfig(model="m", engine=names))


def test_without_a_cluster_the_error_says_how_to_start_one(
    ray_cluster: Any, served_model_dir: Path, tmp_path: Path
) -> None:
    """Beside the private Ray of another program, which is no cluster to deploy on."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "raylm.cli", "deploy", str(served_model_dir)]
    environment |= {"RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert "found no running Ray cluster. Start one: ray start --head" in done.stderr


def test_the_cluster_of_ray_start_is_found_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import write_ray_address

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert _recorded_address() is None
    (tmp_path / "ray").mkdir()
    write_ray_address("10.0.0.1:6379", str(tmp_path / "ray"))  # what `ray start` calls
    assert _recorded_address() == "10.0.0.1:6379"


def test_a_chat_page_is_not_deployed() -> None:
    with pytest.raises(ConfigError, match=r"chat_page: .*serve/chat_page.yaml"):
        deploy_app(ServeConfig(model="m", chat_page=True))


def test_what_is_recorded_is_found_from_any_folder(
    served_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    for name in ("m", "draft"):
        shutil.copytree(served_model_dir, models / name)
    build_adapter(tmp_path / "root" / "polite", served_model_dir, seed=1)
    (tmp_path / "key").write_text("k")
    speculation = {"method": "draft_model", "model": "models/draft"}
    entries = [{"model": "models/m", "name": "a", "adapter": "root/polite"}, {"model": "models/m", "name": "b"}]
    own = {"model": "models/m", "name": "c", "speculation": speculation, "adapters": "root"}
    monkeypatch.chdir(tmp_path)
    config = {"models": [*entries, own], "adapters": "root", "api_key_file": "key", "dtype": "float32"}
    revision = prepared(load_config(ServeConfig, config), has_key=True)
    stored = revision.settings
    assert (stored["adapters"], stored["api_key_file"]) == (str(tmp_path / "root"), str(tmp_path / "key"))
    assert stored["models"][0]["adapter"] == str(tmp_path / "root" / "polite")
    assert "adapters" not in stored["models"][1]
    assert stored["models"][2]["speculation"]["model"] == str(models / "draft")
    assert stored["models"][2]["adapters"] == str(tmp_path / "root")
    monkeypatch.chdir("/")
    assert [model.name for model in checked_models(revision.config)] == ["a", "b", "c"]


def test_models_that_leave_are_those_of_a_gateway() -> None:
    """By what ran, not by what the configuration would be today: its key file may say otherwise now."""
    config = load_config(ServeConfig, {"model": "new", "gateway": "always"})
    former = {"model": "old", "num_replicas": 2}
    behind_gateway = Revision(1, "", former, {"engine-old": "1", "gateway": "2"}, False)
    assert [(model.name, alone) for model, alone in _leaving(config, behind_gateway)] == [("old", True)]
    assert _leaving(config, Revision(1, "", former, {"engine": "1"}, False)) == []


def test_a_server_whose_settings_hold_a_secret_is_not_recorded(served_model_dir: Path) -> None:
    model = str(served_model_dir)
    assert _recordable(ServeConfig(model=model, engine={"hf_token": "x"})) is None
    assert _recordable(ServeConfig(model=model)) is not None


def test_the_proxy_gets_paths_of_certificates_that_it_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = ServeConfig(model="m", tls_cert_file="cert.pem", tls_key_file="key.pem")
    expected = {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    assert tls_options(config) == expected
    assert tls_options(ServeConfig(model="m")) == {}


def test_only_one_at_a_time_changes_the_application(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a driver that is gone is gone as well."""
    with monkeypatch.context() as patched:
        patched.setattr("raylm.serving.deploy._RELEASE_S", 0.0)
        with _alone(), pytest.raises(ServingError, match=r"another raylm deploy changes the application\. Wait until"):
            delete()
    address = ray_cluster.get_runtime_context().gcs_address
    holds = f"""
import os, ray
ray.init({address!r})
from raylm.serving.deploy import _alone
_alone().__enter__()
os.write(1, b"held")
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", holds], capture_output=True, text=True, timeout=120)
    assert done.stdout == "held", done.stderr
    with _alone(), pytest.raises(ServingError, match="another raylm deploy"), _alone():
        pass


@pytest.fixture
def remembered(ray_cluster: Any, served_model_dir: Path, tmp_path: Path) -> Iterator[list[Revision]]:
    """Two versions that the cluster remembers although nothing runs: Serve was shut down, or died. The model of the
    first is gone since."""
    gone = tmp_path / "gone"
    shutil.copytree(served_model_dir, gone)
    for model in (gone, served_model_dir):
        revision = prepared(load_config(ServeConfig, {"model": str(model), "name": "m"}), has_key=False)
        history.append(revision, {"engine": "1"})
    shutil.rmtree(gone)
    yield history.revisions()
    history.clear()


def test_a_rollback_where_nothing_runs_goes_on_from_what_is_remembered(remembered: list[Revision]) -> None:
    for _ in range(2):  # and forgets nothing when it fails
        with pytest.raises(ModelError, match="gone"):
            roll_back()
    assert history.revisions() == remembered


def test_a_deployment_that_fails_where_nothing_runs_forgets_nothing(
    remembered: list[Revision], served_model_dir: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServingError, match="port"):
            deploy_app(ServeConfig(model=str(served_model_dir), port=taken.getsockname()[1]))
    assert history.revisions() == remembered


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no model"),
        (["port=1"], "has no model"),
        (["--status", "model"], "goes with a new version"),
        (["--delete", "port=1"], "goes with a new version"),
    ],
)
def test_what_the_command_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", *words]) == 2
    assert message in capsys.readouterr().err


class Load:
    """Clients that ask all the time, streamed and not; what they got, and what went wrong."""

    def __init__(self, url: str, model: str) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._url, self._model, self._ended = url, model, threading.Event()

    @contextmanager
    def running(self) -> Iterator["Load"]:
        threads = [threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _ask(self, stream: bool) -> None:
        body = {"model": self._model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._ended.is_set():
                try:
                    with client.stream(
                        "POST", f"{self._url}/v1/completions", json={**body, "stream": stream}
                    ) as answer:
                        text = answer.read().decode()
                    if answer.status_code != 200 or (stream and "data: [DONE]" not in text):
                        self.failures.append(f"{answer.status_code}: {text[-300:]}")
                    else:
                        self.answers["stream" if stream else "plain"] += 1
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                time.sleep(0.02)


def text_of(url: str, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that work and differ, and one whose weights are cut off."""
    folder = tmp_path_factory.mktemp("versions")
    built = {
        name: build_tiny_model(folder / name, hidden_size=128, initializer_range=spread)
        for name, spread in (("one", 0.1), ("two", 0.3), ("broken", 0.1))
    }
    weights = built["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return built


@pytest.mark.slow
def test_a_model_is_upgraded_and_rolled_back_under_load(ray_cluster: Any, models: dict[str, Path]) -> None:
    """Known fault W13 among others: no request fails while versions come, fail and go back."""
    config = {"name": "m", "kv_cache_gib": 0.1, "port": free_port(), "start_timeout_s": 240}

    def version(name: str) -> ServeConfig:
        return load_config(ServeConfig, {**config, "model": str(models[name])})

    from ray import serve

    first = deploy_app(version("one"))
    try:
        assert (first.revision, first.models, first.replicas) == (1, [["m"]], {"engine": 1})
        one = text_of(first.url, "m")
        with Load(first.url, "m").running() as load:
            second = deploy_app(version("two"))
            assert second.revision == 2
            two = text_of(first.url, "m")
            assert two != one
            with pytest.raises(ServingError, match=r"did not start: .*The former version goes on answering"):
                deploy_app(version("broken"))
            assert text_of(first.url, "m") == two
            assert (deployed().revision, deployed().status) == (2, "RUNNING")
            back = roll_back()
            assert (back.revision, back.before) == (1, [])
            assert text_of(first.url, "m") == one
            with pytest.raises(ServingError, match=r"no former version. Deploy the one"):
                roll_back()
            with pytest.raises(ServingError, match="cannot change that in place"):
                deploy_app(load_config(ServeConfig, {**config, "model": str(models["two"]), "gateway": "always"}))
        logging.getLogger(__name__).info("answers during the upgrades: %s", load.answers)
        assert load.failures == []
        assert min(load.answers["stream"], load.answers["plain"]) > 50
        assert deploy_app(version("two")).before == [1]
        serve.delete("raylm")
        with pytest.raises(ServingError, match="nothing deployed"):
            deployed()
        assert roll_back().revision == 1
        assert text_of(first.url, "m") == one
    finally:
        delete()
    with pytest.raises(ServingError, match="nothing deployed"):
        deployed()


@pytest.mark.slow
def test_models_come_and_go_behind_a_gateway_while_another_answers(ray_cluster: Any, models: dict[str, Path]) -> None:
    config = {"kv_cache_gib": 0.1, "port": free_port(), "start_timeout_s": 240, "gateway": "always"}

    def of(*entries: dict[str, Any]) -> ServeConfig:
        return load_config(ServeConfig, {**config, "models": list(entries)})

    staying = {"model": str(models["one"]), "name": "staying"}
    first = deploy_app(of(staying, {"model": str(models["two"]), "name": "leaving"}))
    try:
        one, two = text_of(first.url, "staying"), text_of(first.url, "leaving")
        before = engine_processes()
        with Load(first.url, "staying").running() as load:
            with pytest.raises(ServingError, match=r"did not start: .*The former version goes on answering"):
                deploy_app(of(staying, {"model": str(models["broken"]), "name": "coming"}))
            assert text_of(first.url, "leaving") == two
            coming = {"model": str(models["two"]), "name": "coming"}
            second = deploy_app(of(staying, coming))
            assert second.models == [["staying"], ["coming"]]
            assert text_of(first.url, "coming") == two
            body = {"model": "leaving", "prompt": PROMPT}
            assert httpx.post(f"{first.url}/v1/completions", json=body, trust_env=False).status_code == 404
            back = roll_back()
            assert back.models == [["staying"], ["leaving"]]
            assert (text_of(first.url, "leaving"), text_of(first.url, "staying")) == (two, one)
            assert len(before & engine_processes()) == 1  # the one that stayed was never started anew
        assert load.failures == []
        assert min(load.answers["stream"], load.answers["plain"]) > 50
    finally:
        delete()


def engine_processes() -> set[int]:
    import psutil

    from tests.conftest import command_line

    children = psutil.Process().children(recursive=True)
    return {process.pid for process in children if "EngineCore" in command_line(process)}
