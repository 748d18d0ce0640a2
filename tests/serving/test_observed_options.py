"""Figures and traces that exist only with an option: speculation, adapters, OpenTelemetry."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raylm.serving.dashboard import PANELS, metric_names
from tests.serving.request_table import completion
from tests.serving.servers import Running, read_metrics, running_server

pytestmark = pytest.mark.slow

SENTINEL = "sentinel-of-a-prompt"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class Collector(ThreadingHTTPServer):
    """An OTLP collector over HTTP: keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def observed(
    served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Running]:
    settings = [
        "dtype=float32",
        "engine.speculative_config={method: ngram, num_speculative_tokens: 3, prompt_lookup_max: 3}",
        "engine.enable_lora=true",
        f"engine.otlp_traces_endpoint=http://127.0.0.1:{collector.server_port}/v1/traces",
    ]
    variables = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "500"}
    folder = tmp_path_factory.mktemp("observed")
    with running_server(served_model_dir, folder, settings, variables=variables) as server:
        yield server


def test_every_figure_of_every_panel_is_there(observed: Running) -> None:
    body = completion(prompt=[40, 41, 42, 43] * 12, max_tokens=60, ignore_eos=True).body
    assert observed.get("/v1/completions", "POST", json=body).status_code == 200
    named = {name for panel in PANELS for name in metric_names(panel)}
    deadline = time.monotonic() + 120
    while lacking := named - set(there := read_metrics(observed.get("/metrics").text)):
        assert time.monotonic() < deadline, lacking
        time.sleep(1)  # Ray hands Serve's figures on every few seconds
    drafts, accepted = (
        there["vllm:spec_decode_num_draft_tokens_total"],
        there["vllm:spec_decode_num_accepted_tokens_total"],
    )
    assert drafts >= accepted > 0
    assert there["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == accepted


def test_a_request_is_a_span_of_the_clients_trace_without_its_prompt(observed: Running, collector: Collector) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    body = completion(prompt=SENTINEL).body
    assert observed.get("/v1/completions", "POST", json=body, headers=headers).status_code == 200

    def spans() -> list[tuple[str, str]]:
        return [
            (span.name, span.trace_id.hex())
            for body in collector.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    deadline = time.monotonic() + 15
    while ("llm_request", TRACE_ID) not in spans():
        assert time.monotonic() < deadline, spans()
        time.sleep(0.2)
    assert not any(SENTINEL.encode() in body for body in collector.bodies)
