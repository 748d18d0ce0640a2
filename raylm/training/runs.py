"""The runs under a folder, side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from raylm.errors import RunDirError
from raylm.training.metrics import EVENTS_FILE, final_figures
from raylm.training.run_dir import CONFIG_FILE


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run. Losses are of the last step that has one; state: the phase it is in, or was in when it died."""

    run: str
    state: str
    model: str
    method: str
    strategy: str
    workers: str
    step: int
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None


def summarise_runs(folder: Path) -> list[RunSummary]:
    """Every run directory under a folder, itself included, by name. Raises RunDirError when there is none."""
    if not folder.is_dir():
        raise RunDirError(str(folder), "there is no such folder.", "Give the folder that runs lie under.")
    found = [path.parent for path in sorted(folder.rglob(CONFIG_FILE)) if "export" not in path.parts]
    runs = [run for run in found if (run / EVENTS_FILE).is_file()]
    if not runs:
        raise RunDirError(str(folder), "holds no runs.")
    return [_summary(run, folder) for run in runs]


def compare_runs(runs: Sequence[Path]) -> dict[str, list[Any]]:
    """Settings in which runs differ: dotted key -> the value of each."""
    trees = [_flat(_config(run)) for run in runs]
    keys = sorted({key for tree in trees for key in tree} - {"run.dir"})
    table = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def table_lines(summaries: Sequence[RunSummary]) -> list[str]:
    """The summaries as aligned lines, headings first."""
    names = [field.name for field in fields(RunSummary)]
    rows = [names, *([_shown(getattr(summary, name)) for name in names] for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _summary(run: Path, folder: Path) -> RunSummary:
    config, figures = _config(run), final_figures(run)
    training, workers = config["training"], config["cluster"]["num_workers"]
    strategy = training["strategy"]
    events = [json.loads(line) for line in (run / EVENTS_FILE).read_text().splitlines() if line.endswith("}")]
    return RunSummary(
        run=str(run.relative_to(folder)) if run != folder else run.name,
        state=events[-1]["phase"] if events else "starting",
        model=config["model"]["path"],
        method=training["method"],
        strategy=("single" if workers == 1 else "ddp") if strategy == "auto" else strategy,
        workers="-".join(map(str, workers)) if isinstance(workers, list) else str(workers),
        step=int(figures.get("step", 0)),
        train_loss=figures.get("train/loss"),
        eval_loss=figures.get("eval/loss"),
        tokens_per_second=figures.get("train/tokens_per_second"),
    )


def _config(run: Path) -> dict[str, Any]:
    import yaml

    try:
        return dict(yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError):
        raise RunDirError(str(run), f"holds no readable {CONFIG_FILE}.") from None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
