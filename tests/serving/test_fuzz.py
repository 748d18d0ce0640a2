"""Requests that schemathesis makes from the server's own OpenAPI: none is answered 5xx, none ends the engine."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.conftest import command_line
from tests.serving.request_table import MODEL, completion
from tests.serving.servers import KEY, Running, running_server

EXAMPLES = 20  # of each operation, valid ones and as many invalid ones
BODIES = (b"", b"null", b"[]", b"{}", b'"x"', b'{"new_data_parallel_size": 2, "drain_timeout": 1}')
SECONDS = 20.0  # of a request; a long one is no fault, and its client goes away
# 5xx of vLLM 0.32 that bare vLLM has as well: method and path -> what triggers it. An empty table is the aim.
KNOWN: dict[tuple[str, str], str] = {}


def engine_of(server: Running) -> int:
    below = psutil.Process(server.process.pid).children(recursive=True)
    return next(process.pid for process in below if "EngineCore" in command_line(process))


@pytest.fixture(scope="module")
def behind_a_gateway(
    served_model_dir: Path, two_versions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """With adapters, whose routes are in the schema as well."""
    folder = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(two_versions / "v1", folder / "adapters" / "one")
    settings = ["dtype=float32", "gateway=always", f"adapters={folder / 'adapters'}"]
    with running_server(served_model_dir, folder, settings) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("which", ["server", "behind_a_gateway"])
def test_no_request_of_the_schema_is_answered_5xx_or_ends_the_engine(
    which: str, request: pytest.FixtureRequest
) -> None:
    server: Running = request.getfixturevalue(which)
    engine = engine_of(server)
    raw = server.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(raw)
    statuses: Counter[int] = Counter()
    faults: dict[tuple[str, str], tuple[int, str, str]] = {}
    slow: list[str] = []
    session = requests.Session()
    session.trust_env = False

    def send(case: Any) -> None:
        name = (case.operation.method.upper(), case.operation.path)
        if isinstance(case.body, dict):
            case.body["model"] = MODEL  # any other is answered 404 before much is looked at
        started = time.monotonic()
        try:
            answer = case.call(
                base_url=server.url,
                session=session,
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=SECONDS,
            )
        except requests.Timeout:
            slow.append(case.as_curl_command())
            return
        except (requests.exceptions.InvalidHeader, UnicodeError):
            return  # what the client itself refuses to send
        statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            faults.setdefault(name, (answer.status_code, answer.text[:200], case.as_curl_command()[:600]))
        assert time.monotonic() - started < SECONDS + 5

    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 10
    adapter_routes = [operation for operation in operations if "adapter" in operation.path]
    assert bool(adapter_routes) == (which == "behind_a_gateway")
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            phases = [Phase.generate]
            options: dict[str, Any] = {"deadline": None, "database": None, "derandomize": True, "phases": phases}

            @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), **options)
            @given(case=operation.as_strategy(generation_mode=mode))
            def fuzz(case: Any) -> None:
                send(case)

            try:
                fuzz()
            except Exception as error:
                if "Unsatisfiable" not in type(error).__name__ and "negat" not in str(error):
                    raise
    for operation in operations:
        if operation.method.upper() == "POST" and not operation.body:  # reads JSON that its schema does not describe
            for body in BODIES:
                answer = server.get(operation.path, "POST", content=body, headers={"content-type": "application/json"})
                statuses[answer.status_code] += 1
                if answer.status_code >= 500:
                    name = ("POST", operation.path)
                    faults.setdefault(name, (answer.status_code, answer.text[:200], body.decode()))
    print(dict(statuses), len(slow), "slow", *slow, sep="\n")
    assert len(slow) < 5
    assert not {name: fault for name, fault in faults.items() if name not in KNOWN}
    assert sum(statuses.values()) > 300
    assert statuses[200] > 20
    assert statuses[400] > 50
    assert engine_of(server) == engine
    assert server.get("/v1/completions", "POST", json=completion().body).status_code == 200
