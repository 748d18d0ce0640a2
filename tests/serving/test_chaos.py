"""Processes killed under load, and a model that takes long: who is told, and how soon all is well again."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import command_line
from tests.serving.request_table import completion
from tests.serving.servers import KEY, Running, free_port, running_server

pytestmark = pytest.mark.slow

HEADERS = {"authorization": f"Bearer {KEY}"}
SHORT = completion(max_tokens=4).body
LONG = completion(max_tokens=120, allowed_token_ids=list(range(30, 90))).body
# A vLLM plugin, found through its metadata as an installed one is: its engine's process starts late.
PLUGIN = """
import multiprocessing, os, time

def wait():
    if multiprocessing.current_process().name.startswith("EngineCore"):
        time.sleep(float(os.environ["RAYLM_TEST_LOAD_S"]))
"""


def processes(server: Running, word: str) -> list[int]:
    below = psutil.Process(server.process.pid).children(recursive=True)
    return sorted(process.pid for process in below if word in command_line(process))


def runs(process: psutil.Process) -> bool:
    """An engine whose replica was killed has no parent that would look at its end."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(what: str, seconds: float, is_so: object) -> float:
    """Seconds until `is_so()`. Raises AssertionError when it takes longer than allowed."""
    assert callable(is_so)
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, what
        time.sleep(0.1)
    return time.monotonic() - started


def answers(server: Running) -> bool:
    try:
        return server.get("/v1/completions", "POST", json=SHORT).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def single(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(served_model_dir, tmp_path_factory.mktemp("single"), ["dtype=float32"]) as server:
        yield server


def test_an_engine_that_is_killed_is_noticed_and_replaced(single: Running, server: Running) -> None:
    """Known fault W13. Noticed: health is no longer 200. The answers come from a new replica, and not from another
    server on this machine, whose proxy would step in for this one's if both had Ray's default port for it."""
    assert server.get("/health").status_code == 200
    (engine,) = processes(single, "EngineCore")
    (replica,) = processes(single, "ray::ServeReplica")
    in_flight: list[tuple[int, str]] = []

    def ask() -> None:
        try:
            answer = single.get(
                "/v1/completions", "POST", json={**LONG, "max_tokens": 240, "n": 64, "temperature": 0.8}
            )
            in_flight.append((answer.status_code, answer.text))
        except httpx.TransportError as error:
            in_flight.append((0, repr(error)))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    os.kill(engine, signal.SIGKILL)
    noticed = until("the dead engine was not noticed", 10, lambda: single.get("/health").status_code != 200)
    given_up = until("its replica stays", 20, lambda: replica not in processes(single, "ray::ServeReplica"))
    thread.join(timeout=20)
    assert not thread.is_alive()
    meanwhile = single.get("/v1/completions", "POST", json=SHORT)
    replaced = until("no new engine", 120, lambda: answers(single) and len(processes(single, "EngineCore")) == 1)
    print(f"noticed after {noticed:.1f} s, given up {given_up:.1f} s later, replaced {replaced:.1f} s later")
    print(f"in flight: {in_flight[0][0]} {in_flight[0][1][:300]}")
    print(f"sent meanwhile: {meanwhile.status_code} {meanwhile.text[:200]}")
    assert processes(single, "EngineCore") != [engine]
    assert processes(single, "ray::ServeReplica") != [replica]
    [(status, text)] = in_flight
    assert status == 0 or (status >= 500 and json.loads(text)["error"]["message"])


def test_a_killed_replica_costs_only_what_was_in_flight(
    served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = ["dtype=float32", "num_replicas=2", "num_cpus=1"]
    with running_server(served_model_dir, tmp_path_factory.mktemp("two"), settings) as server:
        assert len(processes(server, "ray::ServeReplica")) == 2
        engines = [psutil.Process(engine) for engine in processes(server, "EngineCore")]
        pages = [server.get("/metrics").text for _ in range(12)]
        assert len({re.findall(r'^vllm:num_requests_running{replica="(\w+)"', page, re.M)[0] for page in pages}) == 2
        begun, failed, killed_at = asyncio.run(load_and_kill(server, "ray::ServeReplica"))
        print(f"{len(failed)} of {len(begun)} failed: {failed}")
        assert len(begun) == 200
        assert 0 < len(failed) <= 16
        # In flight, or sent before HAProxy could see it.
        print([round(start - killed_at, 2) for start, _ in failed])
        assert all(start < killed_at + 1 for start, _ in failed)
        assert all(reason for _, reason in failed)
        until("an engine outlives its replica", 20, lambda: sum(runs(engine) for engine in engines) == 1)
        until("no second replica", 120, lambda: len(processes(server, "EngineCore")) == 2)
        assert answers(server)


@pytest.mark.parametrize("gateway", [False, True], ids=["direct", "gateway"])
def test_a_dead_engine_of_two_is_sent_no_more_requests(
    served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, gateway: bool
) -> None:
    """Its replica could answer each one, with an error and at once, and so look the least busy: with 16 at a time, 85
    of 200 failed so. A gateway asks the other replica again, also for what was at work."""
    settings = ["dtype=float32", "num_replicas=2", "num_cpus=1", *(["routing=prefix"] if gateway else [])]
    with running_server(served_model_dir, tmp_path_factory.mktemp("two"), settings) as server:
        before = processes(server, "EngineCore")
        begun, failed, killed_at = asyncio.run(load_and_kill(server, "EngineCore"))
        print(f"{len(failed)} of {len(begun)} failed: {failed}")
        print([round(start - killed_at, 2) for start, _ in failed])
        if gateway:
            assert not failed
        else:
            assert 0 < len(failed) <= 24
        assert all(start < killed_at + 1 for start, _ in failed)
        assert all(reason for _, reason in failed)
        until("no second engine", 120, lambda: len(set(processes(server, "EngineCore")) - {before[0]}) == 2)
        assert answers(server)


async def load_and_kill(server: Running, what: str) -> tuple[list[float], list[tuple[float, str]], float]:
    """200 requests, 16 at a time; a process is killed after 60. Gives when each began, and which failed and how."""
    begun: list[float] = []
    failed: list[tuple[float, str]] = []
    killed_at = 0.0
    at_once = asyncio.Semaphore(16)

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        nonlocal killed_at
        async with at_once:
            started = time.monotonic()
            begun.append(started)
            if number == 60:
                os.kill(processes(server, what)[0], signal.SIGKILL)
                killed_at = started = time.monotonic()
            try:
                answer = await client.post(f"{server.url}/v1/completions", json={**LONG, "prompt": [40 + number % 50]})
                if answer.status_code != 200:
                    failed.append((started, f"{answer.status_code} {answer.text[:200]}"))
            except httpx.TransportError as error:
                failed.append((started, repr(error)))

    async with httpx.AsyncClient(headers=HEADERS, timeout=60, trust_env=False) as client:
        await asyncio.gather(*(ask(client, number) for number in range(200)))
    return begun, failed, killed_at


def test_a_model_that_loads_for_long_is_not_ready_and_starts_once(
    served_model_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Known fault W13. Longer than Serve's health check and its timeout."""
    (tmp_path / "slow_load.py").write_text(PLUGIN)
    metadata = tmp_path / "slow_load-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-load\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nslow = slow_load:wait\n")
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    port = free_port()
    seen: list[int] = []
    engines: set[int] = set()
    done = threading.Event()

    def all_engines() -> set[int]:
        below = psutil.Process().children(recursive=True)
        return {process.pid for process in below if "EngineCore" in command_line(process)}

    of_others = all_engines()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.append(httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=5).status_code)
            except httpx.TransportError:
                seen.append(0)
            engines.update(all_engines() - of_others)
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        variables = {"PYTHONPATH": search, "RAYLM_TEST_LOAD_S": "75"}
        folder = tmp_path_factory.mktemp("late")
        with running_server(served_model_dir, folder, ["dtype=float32"], port=port, variables=variables) as server:
            seconds = time.monotonic() - started
            before = seen.copy()
            assert server.get("/health").status_code == 200
            assert answers(server)
    finally:
        done.set()
        watcher.join()
    print(f"ready after {seconds:.0f} s; statuses { ({status: before.count(status) for status in set(before)}) }")
    assert seconds > 75
    # 0: nobody listens yet, or no answer within 5 s; 404: Serve knows no application yet.
    assert set(before) <= {0, 404, 503, 200}
    assert 200 not in before[:-8]  # it is seen ready and stopped being watched within seconds
    assert len(before) > 15
    assert len(engines) == 1
