"""report.md and report.html of a run directory."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.config.settings import changed_settings
from raylm.training.report.curves import draw_curves
from raylm.training.report.document import Block, Code, Paragraph, Part, Picture, Table, to_html, to_markdown
from raylm.training.report.facts import RunFacts, read_facts
from raylm.words import counted

CURVES_FILE = "curves.png"
SAMPLED_STEPS = 12
"""Rows of the table beside the curves."""


@dataclass(frozen=True, slots=True)
class ReportResult:
    """Where a report lies."""

    markdown: str
    html: str


def write_report(run_dir: Path) -> ReportResult:
    """Writes report.md, report.html and curves.png into a run directory, whatever became of the run.

    Raises RunDirError for a folder that holds no run.
    """
    facts = read_facts(run_dir)
    name = facts.config.metrics.run_name if facts.config else None
    title, parts = f"Run {name or run_dir.name}", list(report_parts(facts))
    for part in parts:
        for block in part.blocks:
            if isinstance(block, Picture):
                _write(run_dir / block.file, block.png)
    result = ReportResult(str(run_dir / "report.md"), str(run_dir / "report.html"))
    _write(Path(result.markdown), to_markdown(title, parts).encode())
    _write(Path(result.html), to_html(title, parts).encode())
    return result


def report_parts(facts: RunFacts) -> Iterator[Part]:
    """The sections; those with nothing to say are left out."""
    yield Part("What was run", [Table(list(_summary(facts)))])
    curves = draw_curves(facts.metrics)
    if curves:
        picture = Picture(curves, CURVES_FILE, "loss, learning rate, gradient norm and tokens per second over steps")
        yield Part("Curves", [picture, *_sampled(facts.metrics)])
    yield Part("Settings that differ from the defaults", [_changed(facts)])
    if facts.data:
        yield Part("Data", list(_data(facts)))
    if facts.phases:
        yield Part("Wall time", [Table([[phase, _seconds(spent)] for phase, spent in facts.phases.items()])])
    if facts.checkpoints:
        yield Part("Checkpoints", [_checkpoints(facts)])
    if facts.hosts:
        yield Part("Hardware", [_hardware(facts)])
        yield Part("Software", [Table([[name, found] for name, found in _versions(facts).items()])])
    yield Part("All settings", [Code(facts.settings_text)])


def _summary(facts: RunFacts) -> Iterator[list[str]]:
    yield ["state", facts.state]
    if (config := facts.config) is not None:
        yield ["model", config.model.path]
        yield ["method", config.training.method]
        yield ["strategy", config.strategy]
        yield ["workers", str(config.cluster.num_workers)]
        yield ["precision", facts.event("precision") or config.training.precision]
    if (total := facts.event("parameters")) is not None:
        trainable = facts.event("trainable_parameters")
        yield ["parameters", f"{total:,}, of which {trainable:,} are trained ({trainable / total:.2%})"]
    steps, planned = facts.newest("step"), facts.data.get("data.train", {}).get("num_steps")
    yield ["steps", f"{steps or 0} of {planned or 'an unknown number'}"]
    for label, key in (
        ("training loss", "train/loss"),
        ("evaluation loss", "eval/loss"),
        ("perplexity", "eval/perplexity"),
        ("tokens per second, last step", "train/tokens_per_second"),
        ("model FLOPs utilisation, last step", "train/mfu"),
    ):
        if (value := facts.newest(key)) is not None:
            yield [label, _number(value)]
    tokens = sum(line.get("train/tokens", 0) for line in facts.metrics)
    if tokens:
        yield ["tokens of the logged steps", f"{tokens:,}"]
    times = [event["time"] for event in facts.events if "time" in event]
    if times:
        yield ["started", _clock(times[0])]
        yield ["last event", _clock(times[-1])]
    yield ["run directory", str(facts.run.path)]
    for label, path in (("exported model", facts.run.export), ("adapter", facts.run.adapter)):
        if path.is_dir():
            yield [label, str(path)]


def _sampled(metrics: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A few steps in figures, evenly spread, the first and the last among them; and all evaluations."""
    steps = [line for line in metrics if "train/loss" in line]
    if steps:
        count = min(SAMPLED_STEPS, len(steps))
        chosen = sorted({round(place * (len(steps) - 1) / max(1, count - 1)) for place in range(count)})
        keys = ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second")
        rows = [[str(steps[place]["step"]), *(_number(steps[place].get(key)) for key in keys)] for place in chosen]
        yield Table(rows, ["step", "loss", "learning rate", "gradient norm", "tokens/s"])
    evaluations = [line for line in metrics if "eval/loss" in line]
    if evaluations:
        rows = [
            [str(line["step"]), _number(line["eval/loss"]), _number(line.get("eval/perplexity"))]
            for line in evaluations
        ]
        yield Table(rows, ["step", "evaluation loss", "perplexity"])


def _changed(facts: RunFacts) -> Block:
    if facts.config is None:
        return Paragraph("config.yaml is of another version of raylm; all settings stand below.")
    changed = changed_settings(facts.config)
    return Table([[key, _value(value)] for key, value in changed.items()], ["setting", "value"])


def _data(facts: RunFacts) -> Iterator[Block]:
    for name, counts in facts.data.items():
        rejected = counts.get("rejected", {})
        by_reason = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
        yield Paragraph(name)
        yield Table(
            [
                ["rows read", f"{counts['rows']:,}"],
                ["rows used", f"{counts['used']:,}"],
                ["rows rejected", f"{sum(rejected.values()):,}" + (f" ({by_reason})" if rejected else "")],
                ["rows left out on purpose", f"{counts.get('left_out', 0):,}"],
                ["sequences", f"{counts.get('sequences', 0):,}"],
                ["tokens", f"{counts['tokens']:,}"],
                ["tokens that carry loss", f"{counts['loss_tokens']:,}"],
            ]
        )
        sources = counts.get("sources", [])
        if sources:
            total = sum(source["tokens"] for source in sources) or 1
            rows = [
                [source["path"], f"{source['rows']:,}", f"{source['used']:,}", f"{source['tokens'] / total:.1%}"]
                for source in sources
            ]
            yield Table(rows, ["source", "rows", "used", "share of an epoch's tokens"])


def _checkpoints(facts: RunFacts) -> Table:
    rows = []
    for meta in facts.checkpoints:
        size = sum(entry["bytes"] for entry in meta.files.values()) / 2**20
        best = "best" if facts.best is meta else ""
        rows.append([str(meta.step), f"{size:.1f} MiB", _number(meta.eval_loss), best])
    return Table(rows, ["step", "size", "evaluation loss", ""])


def _hardware(facts: RunFacts) -> Table:
    rows = [
        [
            host.name,
            f"{host.cpu}, {counted(host.cpus, 'CPU')}",
            f"{host.memory_gib} GiB",
            "; ".join(host.gpus) or "none",
        ]
        for host in facts.hosts
    ]
    return Table(rows, ["host", "CPU", "memory", "GPUs"])


def _versions(facts: RunFacts) -> dict[str, str]:
    """Package -> version; all that were seen where hosts differ."""
    found: dict[str, list[str]] = {}
    for host in facts.hosts:
        for name, number in {**host.versions, "platform": host.platform}.items():
            found[name] = [*dict.fromkeys([*found.get(name, []), number])]
    return {name: ", ".join(numbers) for name, numbers in found.items()}


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _seconds(spent: float) -> str:
    return f"{spent:.1f} s" if spent < 120 else f"{int(spent) // 3600}:{int(spent) // 60 % 60:02}:{int(spent) % 60:02}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.rename(path)
