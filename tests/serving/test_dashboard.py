"""What is seen of a server: one /metrics, and a dashboard that asks for nothing that is not there."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raylm.cli import main
from raylm.serving.dashboard import PANELS, dashboard, metric_names
from raylm.serving.metrics import OneMetricsPage, Phases, labelled, serve_lines
from tests.serving.request_table import MODEL, REQUESTS
from tests.serving.servers import KEY, Running
from tests.serving.test_conformance import send

PAGE = """# HELP a:b_total What it is {really}.
# TYPE a:b_total counter
a:b_total{x="{ y"} 1.0
plain 2.0
"""


def samples(page: str) -> dict[str, dict[str, str]]:
    """Name of each sample -> its labels, the last of that name."""
    return {sample.name: sample.labels for family in text_string_to_metric_families(page) for sample in family.samples}


def test_a_label_is_added_to_every_sample_and_nothing_else() -> None:
    page = labelled(PAGE, "replica", "r1")
    assert samples(page) == {"a:b_total": {"x": "{ y", "replica": "r1"}, "plain": {"replica": "r1"}}
    assert page.splitlines()[:2] == PAGE.splitlines()[:2]


def test_of_the_nodes_page_only_serves_figures_are_taken() -> None:
    page = (
        "# HELP ray_x h\n# TYPE ray_x gauge\nray_x 1\n# HELP ray_serve_y h\n# TYPE ray_serve_y gauge\nray_serve_y 2\n"
    )
    assert serve_lines(page).splitlines() == page.splitlines()[3:]


def test_a_preflight_does_not_get_the_figures() -> None:
    """It passes without a key, and vLLM answers it with 200."""
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"OK"})

    async def send(message: Any) -> None:
        sent.append(message)

    page = OneMetricsPage(app, "r1", lambda: "raylm_own 1\n", lambda: "")
    for method in ("OPTIONS", "GET"):
        asyncio.run(page({"type": "http", "method": method, "path": "/metrics"}, None, send))  # type: ignore[arg-type]
    assert sent[1]["body"] == b"OK"
    assert b"raylm_own" in sent[3]["body"]


def test_a_phase_counts_when_it_ends_well() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="x"), phases.timed("broken"):
        raise ValueError("x")
    with phases.timed("whole"):
        pass
    assert list(phases.seconds) == ["whole"]


def test_one_metrics_page_after_traffic(server: Running) -> None:
    """vLLM's, ours and Serve's, each sample with its replica; and what any panel names is there."""
    before = server.metrics()
    for name in ("completion", "chat", "prompt longer than the context"):
        send(server.url, REQUESTS[name], key=KEY)
    deadline = time.monotonic() + 120
    while "ray_serve_deployment_replica_healthy{" not in (page := server.get("/metrics").text):
        assert time.monotonic() < deadline, page  # Ray hands Serve's figures on every few seconds
        time.sleep(1)
    after = server.metrics()
    there = samples(page)
    assert after["vllm:generation_tokens_total"] - before.get("vllm:generation_tokens_total", 0) == 16
    assert after["http_requests_total"] - before.get("http_requests_total", 0) == 3
    assert there["vllm:generation_tokens_total"]["model_name"] == MODEL
    replicas = {labels["replica"] for name, labels in there.items() if not name.startswith("ray_serve_")}
    assert len(replicas) == 1
    assert replicas == {there["ray_serve_deployment_replica_healthy"]["replica"]}
    assert there["raylm_model_info"]["model_name"] == MODEL
    phases = {
        sample.labels["phase"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "raylm_startup_seconds"
    }
    assert set(phases) == {"import", "engine", "first answer", "routes"}
    assert all(seconds > 0 for seconds in phases.values())
    named = {name for panel in PANELS if not panel.needs for name in metric_names(panel)}
    assert len(named) >= 20
    assert named <= set(there), named - set(there)


def test_the_dashboard_is_what_grafana_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "dashboard"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(["metrics", "dashboard", "--output", str(tmp_path / "board.json")]) == 0
    assert json.loads((tmp_path / "board.json").read_text()) == printed == dashboard()
    graphs = [panel for panel in printed["panels"] if panel["type"] == "timeseries"]
    assert [graph["title"] for graph in graphs] == [panel.title for panel in PANELS]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in printed["panels"]]
    assert len(set(places)) == len(places)
    assert all(place + panel["gridPos"]["w"] <= 24 for (place, _), panel in zip(places, printed["panels"], strict=True))
    assert len({panel["id"] for panel in printed["panels"]}) == len(places)
    variables = {entry["name"] for entry in printed["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(graphs)))
    assert used - {"__rate_interval"} <= variables


def test_every_panel_names_figures_and_balances_its_brackets() -> None:
    for panel in PANELS:
        assert metric_names(panel)
        for query in panel.queries:
            assert query.count("(") == query.count(")")
            assert query.count("{") == query.count("}")
