"""train, plan, sweep, config show: what runs on a training configuration."""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import raylm
from raylm.cli.arguments import add_command, add_group, add_overrides
from raylm.errors import ConfigError


def add(commands: Any) -> None:
    """Declares train, plan and sweep."""
    train = add_command(commands, "train", _train, "fine-tune a model as a YAML file says")
    train.add_argument("config", help="YAML configuration")
    add_overrides(train)
    plan = add_command(commands, "plan", _plan, "say what a run would take, and check it, before anything starts")
    plan.add_argument("config", help="YAML configuration")
    plan.add_argument("--tokens-per-second", type=float, metavar="X", help="measured rate of all ranks, for the time")
    plan.add_argument("--utilisation", type=float, default=0.4, metavar="X", help="MFU to assume (default 0.4)")
    plan.add_argument("--memory-gib", type=float, metavar="X", help="memory of each rank (default: this machine's)")
    add_overrides(plan)
    sweep = add_command(commands, "sweep", _sweep, "train over a space of settings and keep the best")
    sweep.add_argument("config", nargs="?", help="YAML of the sweep")
    sweep.add_argument("--set", action="append", default=[], metavar="key=value", help="setting of all trials")
    sweep.add_argument("--resume", metavar="DIR", help="continue the sweep in this folder")
    sweep.add_argument("--retry-failed", action="store_true", help="with --resume: failed trials go on as well")
    sweep.add_argument("--dry-run", action="store_true", help="check everything, say what would run, start nothing")
    add_overrides(sweep)


def add_config(commands: Any) -> None:
    """Declares config show."""
    config = add_group(commands, "config", "look at configurations")
    show = add_command(config, "show", _show, "print the resolved configuration")
    show.add_argument("config", help="YAML configuration")
    add_overrides(show)


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM unwinds what was begun, where nothing better is done with it. Ray prints on stdout what it does about a
    lost worker: that belongs with the rest."""
    with contextlib.redirect_stdout(sys.stderr):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


def _train(options: Any) -> None:
    with _unwinding():
        result = raylm.train(options.config, options.overrides)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    if result.stopped:
        print(f"stopped         after step {result.steps}: {result.stopped}; training.resume=auto goes on")
    print(f"run directory   {result.run_dir}")
    print(f"report          {result.report}")
    if result.export_dir:
        print(f"model           {result.export_dir}")
        print(f"try it          raylm chat {result.export_dir}")


def _plan(options: Any) -> None:
    plan = raylm.plan(
        options.config,
        options.overrides,
        tokens_per_second=options.tokens_per_second,
        utilisation=options.utilisation,
        memory_gib=options.memory_gib,
    )
    if options.json:
        print(json.dumps({**dataclasses.asdict(plan), "fits": plan.fits}))
        return
    from raylm.training.planning.report import plan_lines

    print("\n".join(plan_lines(plan)))


def _sweep(options: Any) -> None:
    source, overrides = options.config, list(options.overrides)
    if source and "=" in source and not Path(source).is_file():  # with --resume there need be no file
        source, overrides = None, [source, *overrides]
    overrides += [f"set.{setting}" for setting in options.set]
    if options.retry_failed and not options.resume:
        raise ConfigError("--retry-failed", "is for a sweep that is resumed.", "Add --resume DIR, or drop it.")
    if options.dry_run and options.resume:
        raise ConfigError("--dry-run", "excludes --resume.", "Give the sweep's YAML file without --resume, or drop it.")
    if options.dry_run:
        _outline(source, overrides, as_json=options.json)
        return
    with _unwinding():
        result = raylm.sweep(source, overrides, resume=options.resume, retry_failed=options.retry_failed)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"sweep           {result.sweep_dir}")
    print(f"trials          {', '.join(f'{count} {state}' for state, count in result.states.items())}")
    for sink, numbers in result.lacking.items():
        few = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
        print(f"lacks figures   {sink}, of trial {few}: raylm track {result.sweep_dir}/trials/{numbers[0]:04d}")
    print(f"report          {result.report}")
    if result.best is not None:
        print(f"best            trial {result.best}: {result.metric} {result.value:.6g} at step {result.step}")
        print(*(f"                {key}={value}" for key, value in result.settings.items()), sep="\n")
        print(f"train it again  raylm train {result.best_config}")
    if result.export_dir:
        print(f"serve it        raylm serve {result.export_dir}")
    if result.interrupted:
        print(f"go on           raylm sweep --resume {result.sweep_dir}")


def _outline(source: Any, overrides: list[str], *, as_json: bool) -> None:
    from raylm.config import SweepConfig, load_config

    if source is None:
        raise ConfigError("sweep --dry-run", "has no configuration.", "Give a YAML file.")
    config = load_config(SweepConfig, source, overrides)
    from raylm.tuning.run import outline_sweep
    from raylm.tuning.space import described

    outline = outline_sweep(config, source)
    if as_json:
        print(json.dumps(dataclasses.asdict(outline)))
        return
    print(f"folder          {outline.sweep_dir}")
    print(f"trials          {outline.trials or 'until the budget is used up'}, by {outline.metric} ({outline.mode})")
    for number, settings in enumerate(outline.first):
        print(f"trial {number:<10}{described(settings)}")


def _show(options: Any) -> None:
    from raylm.config import TrainConfig, dump_yaml, load_config

    config = load_config(TrainConfig, options.config, options.overrides)
    print(
        json.dumps(config.model_dump(mode="json")) if options.json else dump_yaml(config),
        end="\n" if options.json else "",
    )
