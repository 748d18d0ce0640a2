"""checkpoints, runs, report, track: runs that are under way or over."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from raylm.cli.arguments import add_command, add_overrides
from raylm.errors import ConfigError, nearest


def add(commands: Any) -> None:
    """Declares checkpoints, runs, report and track."""
    checkpoints = add_command(commands, "checkpoints", _checkpoints, "list the checkpoints of a run and verify them")
    checkpoints.add_argument("run_dir", metavar="RUN", help="run directory")
    runs = add_command(commands, "runs", _runs, "list the runs under a folder, and the settings in which they differ")
    runs.add_argument("folder", nargs="?", default="runs", help="default: runs")
    runs.add_argument("--sort", default="run", metavar="COLUMN", help="smallest first, such as eval_loss")
    report = add_command(commands, "report", _report, "write report.md and report.html of a run, unfinished or not")
    report.add_argument("run_dir", metavar="RUN", help="run directory")
    track = add_command(commands, "track", _track, "send trackers what they lack of a run that is over")
    track.add_argument("run_dir", metavar="RUN", help="run directory")
    add_overrides(track)


def _checkpoints(options: Any) -> None:
    from raylm.training.checkpoint import verify_checkpoints
    from raylm.training.run_dir import RunDir

    reports = verify_checkpoints(RunDir(Path(options.run_dir).expanduser()).checkpoints)
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports]))
        return
    for report in reports:
        loss = "" if report.eval_loss is None else f"eval loss {report.eval_loss:.4f}"
        state = report.problem or "verified"
        print(f"step {report.step:>8}  {report.num_bytes / 2**20:>10.1f} MiB  {loss:18}  {state}")
    if not reports:
        print("none")


def _runs(options: Any) -> None:
    from raylm.training.runs import SORT_KEYS, compare_runs, summarise_runs, table_lines

    folder = Path(options.folder).expanduser()
    if options.sort not in SORT_KEYS:
        raise ConfigError("--sort", f"{options.sort} is not a column.", nearest(options.sort, SORT_KEYS))
    summaries = summarise_runs(folder, sort=options.sort)
    paths = [folder / summary.run for summary in summaries]
    differences = compare_runs([path if path.is_dir() else folder for path in paths])
    if options.json:
        print(json.dumps({"runs": [dataclasses.asdict(run) for run in summaries], "differences": differences}))
        return
    print("\n".join(table_lines(summaries)))
    for key, values in differences.items():
        print(f"{key}: {', '.join(map(str, values))}")


def _report(options: Any) -> None:
    from raylm.training.report.write import write_report

    result = write_report(Path(options.run_dir).expanduser())
    print(json.dumps(dataclasses.asdict(result)) if options.json else f"{result.markdown}\n{result.html}")


def _track(options: Any) -> None:
    from raylm.config import TrainConfig, load_config
    from raylm.training.run_dir import CONFIG_FILE
    from raylm.training.sinks.follow import send_run

    run_dir = Path(options.run_dir).expanduser().resolve()
    config = load_config(TrainConfig, run_dir / CONFIG_FILE, options.overrides)
    send_run(config, run_dir)
    sinks = list(config.metrics.sinks)
    print(json.dumps({"run_dir": str(run_dir), "sinks": sinks}) if options.json else f"sent to {', '.join(sinks)}")
