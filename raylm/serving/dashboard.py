"""The Grafana dashboard of a server, made from a table: `raylm metrics dashboard > raylm.json`, then import the file.

A panel is a row; tests/serving compares every name in it with the /metrics of a live server. `$rate` is the interval
that Grafana chooses, `$of` the filter of the chosen models and replicas.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

OF = 'model_name=~"$model", replica=~"$replica"'
RATE = "$__rate_interval"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A graph. queries: PromQL -> legend. needs: the server's setting without which the figures do not exist."""

    title: str
    unit: str
    queries: dict[str, str]
    section: str
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


PANELS = (
    Panel(
        section="Requests",
        title="Requests finished",
        unit="reqps",
        queries={_rate("vllm:request_success_total", by="finished_reason"): "{{finished_reason}}"},
        about="abort: the client went away.",
    ),
    Panel(
        section="Requests",
        title="Answers by status",
        unit="reqps",
        queries={_rate("http_requests_total", by="status", of='replica=~"$replica"'): "{{status}}"},
    ),
    Panel(
        section="Requests",
        title="Answers by route",
        unit="reqps",
        queries={_rate("http_requests_total", by="handler", of='replica=~"$replica"'): "{{handler}}"},
    ),
    Panel(
        section="Requests",
        title="Running and waiting",
        unit="short",
        queries={
            f"sum (vllm:num_requests_running{{{OF}}})": "running",
            f"sum (vllm:num_requests_waiting{{{OF}}})": "waiting",
        },
    ),
    Panel(
        section="Requests",
        title="Requests by model",
        unit="reqps",
        queries={_rate("vllm:request_success_total", by="model_name"): "{{model_name}}"},
    ),
    Panel(
        section="Requests",
        title="Whole request",
        unit="s",
        queries=_quantiles("vllm:e2e_request_latency_seconds"),
    ),
    Panel(
        section="Latency",
        title="Time to first token",
        unit="s",
        queries=_quantiles("vllm:time_to_first_token_seconds"),
    ),
    Panel(
        section="Latency",
        title="Between tokens",
        unit="s",
        queries=_quantiles("vllm:inter_token_latency_seconds"),
    ),
    Panel(
        section="Latency",
        title="In the engine's queue",
        unit="s",
        queries=_quantiles("vllm:request_queue_time_seconds"),
    ),
    Panel(
        section="Engine",
        title="Tokens",
        unit="short",
        queries={
            _rate("vllm:prompt_tokens_total"): "prompt",
            _rate("vllm:generation_tokens_total"): "generated",
        },
        about="Tokens per second.",
    ),
    Panel(
        section="Engine",
        title="Key-value cache in use",
        unit="percentunit",
        queries={f"max by (replica) (vllm:kv_cache_usage_perc{{{OF}}})": "{{replica}}"},
    ),
    Panel(
        section="Engine",
        title="Prefix cache hits",
        unit="percentunit",
        queries={_share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"): "share of prompt tokens"},
    ),
    Panel(
        section="Engine",
        title="Preemptions",
        unit="short",
        queries={_rate("vllm:num_preemptions_total"): "per second"},
        about="Above 0 the key-value cache is too small for the load.",
    ),
    Panel(
        section="Engine",
        title="Tokens per engine step",
        unit="short",
        queries=_quantiles("vllm:iteration_tokens_total"),
    ),
    Panel(
        section="Engine",
        title="Memory of the replica's process",
        unit="bytes",
        queries={'max by (replica) (process_resident_memory_bytes{replica=~"$replica"})': "{{replica}}"},
        about="The engine is a process of its own, which is not in this figure.",
    ),
    Panel(
        section="Speculative decoding",
        title="Acceptance rate",
        unit="percentunit",
        queries={
            _share("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"): "of drafts"
        },
        needs="speculation",
    ),
    Panel(
        section="Speculative decoding",
        title="Tokens per engine step of a request",
        unit="short",
        queries={
            f"1 + {_share('vllm:spec_decode_num_accepted_tokens_total', 'vllm:spec_decode_num_drafts_total')}": "mean"
        },
        needs="speculation",
    ),
    Panel(
        section="Speculative decoding",
        title="Accepted by position",
        unit="percentunit",
        queries={
            f"{_rate('vllm:spec_decode_num_accepted_tokens_per_pos_total', by='position')} / on () group_left () "
            f"{_rate('vllm:spec_decode_num_drafts_total')}": "{{position}}"
        },
        needs="speculation",
    ),
    Panel(
        section="Adapters",
        title="Adapters at work",
        unit="short",
        queries={
            'count by (running_lora_adapters) (vllm:lora_requests_info{replica=~"$replica"})': (
                "{{running_lora_adapters}}"
            )
        },
        needs="adapters",
    ),
    Panel(
        section="Adapters",
        title="Requests by adapter",
        unit="reqps",
        queries={_rate("raylm_adapter_requests_total", by="adapter"): "{{adapter}}"},
        about="Counted when a request ends. Without a name: the model itself.",
    ),
    Panel(
        section="Adapters",
        title="Tokens by adapter",
        unit="short",
        queries={_rate("raylm_adapter_tokens_total", by="adapter, kind"): "{{adapter}} {{kind}}"},
        about="Tokens per second.",
    ),
    Panel(
        section="Adapters",
        title="Time to first token by adapter, p95",
        unit="s",
        queries=_by_adapter("raylm_adapter_time_to_first_token_seconds"),
    ),
    Panel(
        section="Adapters",
        title="Between tokens by adapter, p95",
        unit="s",
        queries=_by_adapter("raylm_adapter_time_per_output_token_seconds"),
        about="Of the mean of each answer.",
    ),
    Panel(
        section="Start",
        title="Seconds of the start",
        unit="s",
        queries={'max by (replica, phase) (raylm_startup_seconds{replica=~"$replica"})': "{{phase}} {{replica}}"},
    ),
    Panel(
        section="Start",
        title="Models and versions",
        unit="short",
        queries={
            "count by (model_name, path) (raylm_model_info)": "{{model_name}}: {{path}}",
            "count by (raylm, vllm, ray, torch) (raylm_build_info)": "raylm {{raylm}}, vLLM {{vllm}}, Ray {{ray}}",
        },
    ),
    Panel(
        section="Start",
        title="Replicas that are healthy",
        unit="short",
        queries={"sum by (application, deployment) (ray_serve_deployment_replica_healthy)": "{{application}}"},
    ),
)


def dashboard() -> dict[str, Any]:
    """What Grafana 10 and later imports; the data source is asked for there."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    section = ""
    for panel in PANELS:
        if panel.section != section:
            y, x, section = y + (_HEIGHT if panels else 0), 0, panel.section
            panels.append({"type": "row", "title": section, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}})
            y += 1
        elif x == _COLUMNS:
            x, y = 0, y + _HEIGHT
        panels.append(_graph(panel, x, y))
        x += _WIDTH
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
