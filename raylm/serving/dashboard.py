"""The Grafana dashboard of a server, made from a table: `raylm metrics dashboard > raylm.json`, then import the file.

A panel is a row; tests/serving compares every name in it with the /metrics of a live server. RATE is the interval that
Grafana chooses, OF the filter of the chosen models and replicas.
"""

import re
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

OF_REPLICA = 'replica=~"$replica"'
OF = f'model_name=~"$model", {OF_REPLICA}'
RATE = "$__rate_interval"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph. queries: PromQL -> legend. needs: the server's setting without which the figures do not exist."""

    title: str
    unit: str
    queries: dict[str, str]
    _: KW_ONLY
    needs: Literal["", "speculation", "adapters"] = ""
    about: str = ""


def _quantiles(histogram: str) -> dict[str, str]:
    return {
        f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket{{{OF}}}[{RATE}])))": f"p{share * 100:g}"
        for share in (0.5, 0.95, 0.99)
    }


def _by_adapter(histogram: str) -> dict[str, str]:
    rate = f"rate({histogram}_bucket{{{OF}}}[{RATE}])"
    return {f"histogram_quantile(0.95, sum by (le, adapter) ({rate}))": "{{adapter}}"}


def _rate(counter: str, *, by: str = "", of: str = OF) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({counter}{{{of}}}[{RATE}]))"


def _share(part: str, whole: str) -> str:
    return f"{_rate(part)} / {_rate(whole)}"


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        Panel(
            "Requests finished",
            "reqps",
            {_rate("vllm:request_success_total", by="finished_reason"): "{{finished_reason}}"},
            about="abort: the client went away.",
        ),
        Panel("Answers by status", "reqps", {_rate("http_requests_total", by="status", of=OF_REPLICA): "{{status}}"}),
        Panel("Answers by route", "reqps", {_rate("http_requests_total", by="handler", of=OF_REPLICA): "{{handler}}"}),
        Panel(
            "Running and waiting",
            "short",
            {
                f"sum (vllm:num_requests_running{{{OF}}})": "running",
                f"sum (vllm:num_requests_waiting{{{OF}}})": "waiting",
            },
        ),
        Panel("Requests by model", "reqps", {_rate("vllm:request_success_total", by="model_name"): "{{model_name}}"}),
        Panel("Whole request", "s", _quantiles("vllm:e2e_request_latency_seconds")),
    ),
    "Latency": (
        Panel("Time to first token", "s", _quantiles("vllm:time_to_first_token_seconds")),
        Panel("Between tokens", "s", _quantiles("vllm:inter_token_latency_seconds")),
        Panel("In the engine's queue", "s", _quantiles("vllm:request_queue_time_seconds")),
    ),
    "Engine": (
        Panel(
            "Tokens",
            "short",
            {_rate("vllm:prompt_tokens_total"): "prompt", _rate("vllm:generation_tokens_total"): "generated"},
            about="Tokens per second.",
        ),
        Panel(
            "Key-value cache in use",
            "percentunit",
            {f"max by (replica) (vllm:kv_cache_usage_perc{{{OF}}})": "{{replica}}"},
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            {_share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"): "share of prompt tokens"},
        ),
        Panel(
            "Preemptions",
            "short",
            {_rate("vllm:num_preemptions_total"): "per second"},
            about="Above 0 the key-value cache is too small for the load.",
        ),
        Panel("Tokens per engine step", "short", _quantiles("vllm:iteration_tokens_total")),
        Panel(
            "Memory of the replica's process",
            "bytes",
            {f"max by (replica) (process_resident_memory_bytes{{{OF_REPLICA}}})": "{{replica}}"},
            about="The engine is a process of its own, which is not in this figure.",
        ),
    ),
    "Speculative decoding": (
        Panel(
            "Acceptance rate",
            "percentunit",
            {
                _share(
                    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
                ): "of drafts"
            },
            needs="speculation",
        ),
        Panel(
            "Tokens per engine step of a request",
            "short",
            {
                f"1 + {_share('vllm:spec_decode_num_accepted_tokens_total', 'vllm:spec_decode_num_drafts_total')}": (
                    "mean"
                )
            },
            needs="speculation",
        ),
        Panel(
            "Accepted by position",
            "percentunit",
            {
                f"{_rate('vllm:spec_decode_num_accepted_tokens_per_pos_total', by='position')} / on () group_left () "
                f"{_rate('vllm:spec_decode_num_drafts_total')}": "{{position}}"
            },
            needs="speculation",
        ),
    ),
    "Adapters": (
        Panel(
            "Adapters at work",
            "short",
            {
                f"count by (running_lora_adapters) (vllm:lora_requests_info{{{OF_REPLICA}}})": (
                    "{{running_lora_adapters}}"
                )
            },
            needs="adapters",
        ),
        Panel(
            "Requests by adapter",
            "reqps",
            {_rate("raylm_adapter_requests_total", by="adapter"): "{{adapter}}"},
            about="Counted when a request ends. Without a name: the model itself.",
        ),
        Panel(
            "Tokens by adapter",
            "short",
            {_rate("raylm_adapter_tokens_total", by="adapter, kind"): "{{adapter}} {{kind}}"},
            about="Tokens per second.",
        ),
        Panel("Time to first token by adapter, p95", "s", _by_adapter("raylm_adapter_time_to_first_token_seconds")),
        Panel(
            "Between tokens by adapter, p95",
            "s",
            _by_adapter("raylm_adapter_time_per_output_token_seconds"),
            about="Of the mean of each answer.",
        ),
    ),
    "Start": (
        Panel(
            "Seconds of the start",
            "s",
            {f"max by (replica, phase) (raylm_startup_seconds{{{OF_REPLICA}}})": "{{phase}} {{replica}}"},
        ),
        Panel(
            "Models and versions",
            "short",
            {
                "count by (model_name, path) (raylm_model_info)": "{{model_name}}: {{path}}",
                "count by (raylm, vllm, ray, torch) (raylm_build_info)": "raylm {{raylm}}, vLLM {{vllm}}, Ray {{ray}}",
            },
        ),
        Panel(
            "Replicas that are healthy",
            "short",
            {"sum by (application, deployment) (ray_serve_deployment_replica_healthy)": "{{application}}"},
        ),
    ),
}
PANELS = tuple(panel for section in SECTIONS.values() for panel in section)


def dashboard() -> dict[str, Any]:
    """What Grafana 10 and later imports; the data source is asked for there."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, section in SECTIONS.items():
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}})
        y += 1
        for start in range(0, len(section), _COLUMNS // _WIDTH):
            line = section[start : start + _COLUMNS // _WIDTH]
            panels += [_graph(panel, number * _WIDTH, y) for number, panel in enumerate(line)]
            y += _HEIGHT
    for number, entry in enumerate(panels, start=1):
        entry["id"] = number
    return {
        "title": "raylm serving",
        "uid": "raylm-serving",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source(), *(_choice(*choice) for choice in _CHOICES)]},
        "panels": panels,
    }


def metric_names(panel: Panel) -> set[str]:
    """The samples that a panel asks for."""
    asked = "\n".join(panel.queries)
    return set(re.findall(r"\b((?:vllm:|raylm_|ray_serve_|http_|process_)\w+)", asked))


_CHOICES = (
    ("model", "vllm:num_requests_running", "model_name"),
    ("replica", 'vllm:num_requests_running{model_name=~"$model"}', "replica"),
)


def _source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _choice(name: str, metric: str, label: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    source = {"type": "prometheus", "uid": "${source}"}
    chosen = {"includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"}, "allValue": ".*"}
    return {"name": name, "type": "query", "datasource": source, "query": query, "refresh": 2, **chosen}


def _graph(panel: Panel, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "datasource": source}
        for number, (query, legend) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }
