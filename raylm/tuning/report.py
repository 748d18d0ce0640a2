"""report.html and report.md of a sweep, and its pictures."""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from raylm.training.report.document import Block, Code, Paragraph, Part, Picture, Table, to_html, to_markdown
from raylm.tuning.candidates import Candidates
from raylm.tuning.charts import draw_importances, draw_losses, draw_parallel, draw_rates
from raylm.tuning.importance import importances
from raylm.tuning.journal import SweepState
from raylm.tuning.results import pareto_front, ranked, remark, setting_keys
from raylm.tuning.space import described, shown
from raylm.tuning.tpe import objective_value

PICTURES = {
    "losses.png": "the metric of each trial over steps",
    "parallel.png": "settings of each trial and what came of them, the better the brighter",
    "importance.png": "importance of each setting",
    "learning_rates.png": "the metric over the learning rate for each optimizer",
}


def write_sweep_report(candidates: Candidates, state: SweepState, *, not_retrained: str = "") -> Path:
    """Writes report.html, report.md and the pictures into the sweep's folder; returns the HTML page. not_retrained: why
    the best settings could not be trained again."""
    folder = candidates.sweep_dir
    parts = list(_parts(candidates, state, not_retrained))
    for part in parts:
        for block in part.blocks:
            if isinstance(block, Picture):
                _write(folder / block.file, block.png)
    title = f"Sweep {folder.name}"
    _write(folder / "report.md", to_markdown(title, parts).encode())
    _write(folder / "report.html", to_html(title, parts).encode())
    return folder / "report.html"


def _parts(candidates: Candidates, state: SweepState, not_retrained: str) -> Iterator[Part]:
    config = candidates.config
    metric = candidates.metric_name
    best = state.best(config.mode)
    yield Part("What was searched", [Table(list(_summary(candidates, state, metric)))])
    if best is not None:
        rule = (
            f"The best is the {'lowest' if config.mode == 'min' else 'highest'} {metric} that any trial ever reported, "
            "at whatever step, and its checkpoint is that of this step; values that are no numbers never count."
        )
        blocks: list[Block] = [Table([[key, shown(value)] for key, value in best[1].settings.items()]), Paragraph(rule)]
        if not_retrained:
            blocks.append(Paragraph(f"These settings could not be trained again: {not_retrained}"))
        yield Part("The best", blocks)
    yield Part("Trials", [_trials(candidates, state)])
    pictures = list(_pictures(candidates, state, metric))
    if pictures:
        yield Part("Pictures", pictures)
    if config.search.objectives:
        yield Part("Trials that no other beats in all objectives", [_front(candidates, state, metric)])
    copies = [(trial, copy) for trial in state.trials.values() for copy in trial.copied_from]
    if copies:
        rows = [[str(trial.number), str(source), str(step)] for trial, (source, step) in copies]
        yield Part("Copies", [Table(rows, ["trial", "went on from trial", "at step"])])
    tree = config.model_dump(mode="json", exclude_unset=True)
    yield Part("The sweep's configuration", [Code(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))])


def _summary(candidates: Candidates, state: SweepState, metric: str) -> Iterator[list[str]]:
    config = candidates.config
    states = [trial.state for trial in state.trials.values()]
    yield ["trials", ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states)) or "none"]
    yield ["metric", f"{metric} ({config.mode})"]
    yield ["search", config.search.name]
    yield ["scheduler", config.scheduler.name]
    yield ["seed", str(config.seed)]
    yield ["tokens", f"{state.tokens:,}"]
    yield ["wall time", f"{state.seconds:.0f} s"]
    if (best := state.best(config.mode)) is not None:
        yield ["best", f"trial {best[0].number}, {best[1].value:.6g} at step {best[1].step}"]
    yield ["folder", str(candidates.sweep_dir)]


def _trials(candidates: Candidates, state: SweepState) -> Table:
    keys = setting_keys(state, candidates)
    rows = []
    for trial in ranked(state, candidates.config.mode):
        best, last = trial.best(candidates.config.mode), trial.last
        settings = best.settings if best else trial.settings
        rows.append(
            [
                str(trial.number),
                f"{best.value:.5g}" if best else "",
                str(best.step) if best else "",
                f"{last.value:.5g}" if last else "",
                str(last.step) if last else "",
                *(shown(settings[key]) if key in settings else "" for key in keys),
                ": ".join(filter(None, [trial.state, remark(trial)])),
            ]
        )
    return Table(rows or [[""]], ["trial", "best", "at step", "last", "at step", *keys, "state"])


def _pictures(candidates: Candidates, state: SweepState, metric: str) -> Iterator[Block]:
    mode = candidates.config.mode
    trials = ranked(state, mode)
    found = [(trial, report) for trial in trials if (report := trial.best(mode)) is not None]
    settings, values = [dict(report.settings) for _, report in found], [report.value for _, report in found]
    folders = {trial.number: candidates.trial_dir(trial.number) for trial in trials}
    best = found[0][0].number if found else None
    images = {
        "losses.png": draw_losses(folders, trials, metric, best),
        "parallel.png": draw_parallel(settings, values, metric, mode),
        "importance.png": draw_importances(importances(settings, values, mode=mode)),
        "learning_rates.png": draw_rates(
            [{"optimizer.name": candidates.base_settings.get("optimizer.name", ""), **one} for one in settings],
            values,
            metric,
        ),
    }
    for name, image in images.items():
        if image is not None:
            yield Picture(image, name, PICTURES[name])


def _front(candidates: Candidates, state: SweepState, metric: str) -> Table:
    config = candidates.config
    extra = [objective.metric for objective in config.search.objectives]
    rows = []
    for trial in pareto_front(candidates, state):
        best, last = trial.best(config.mode), trial.last
        assert best is not None
        figures = [objective_value(last, name) for name in extra]
        cells = [f"{value:.4g}" if value is not None else "" for value in figures]
        rows.append([str(trial.number), f"{best.value:.5g}", *cells, described(best.settings)])
    return Table(rows or [[""]], ["trial", metric, *extra, "settings"])


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.rename(path)
