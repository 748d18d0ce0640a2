"""What a sweep costs beside its trainings, against plain Ray Tune, and what ASHA saves.

    python benchmarks/sweep_overhead.py [--trials 12] [--concurrency 2] [--bare 3] [--peer 4] [--steps 600]
        [--only overhead|asha]

1. `overhead`: wall time of a sweep of equal trials, from the first one's start to the last one's end, over the sum of
   as many bare trainings divided by the concurrency. A bare training is raylm.train without export, alone, in the Ray
   that runs already, its data in the cache; `--bare` of them are timed after one to warm up. `together` is what as many
   bare trainings at once take, over one alone: the part of it that is the machine's.
2. `start_s`: from a trial's start to its first step, beside that of the peer: Ray Tune with a function that calls
   raylm.train, which prepares its data and checks everything in each trial (`peer_s`: its whole wall time
   for `--peer` trials over that share of the sweep's, checks, preparation and report included).
3. A grid of eight learning rates and three weight decays on the text of docs/, whole and with ASHA: `asha_tokens` of
   the grid's, `asha_loss` over its best.

The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def _base(folder: Path, steps: int, rows: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> dict[str, Any]:
    """A tiny model and conversations; steps of some 50 ms."""
    from tests.tiny import build_tiny_model

    folder.mkdir()
    model = build_tiny_model(folder / "model", hidden_size=64, intermediate_size=256, num_hidden_layers=2)
    for name, part in (("train", rows), ("eval", evaluation)):
        (folder / f"{name}.json").write_text(json.dumps({"type": "conversation", "instances": part}))
    return {
        "model": {"path": str(model)},
        "data": {"train": str(folder / "train.json"), "eval": str(folder / "eval.json"), "max_seq_len": 256},
        "training": {
            "global_batch_size": 2,
            "num_epochs": steps,  # more than it takes
            "max_steps": steps,
            "eval_interval_steps": max(1, steps // 8),
            "precision": "fp32",
        },
        "schedule": {"name": "constant"},
        "metrics": {"sinks": []},
        "cluster": {"cpus_per_worker": 1},
    }


def _conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _questions() -> list[dict[str, Any]]:
    from tests.conftest import PAIRS

    return [_conversation(question * 3, answer * 4) for question, answer in PAIRS * 8]


def _paragraphs() -> list[dict[str, Any]]:
    """How those of docs/ begin and go on."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for paragraph in page.read_text().split("\n\n"):
            if len(paragraph) >= 200 and paragraph[0] not in "|`#-":
                text = paragraph.replace("\n", " ")
                found.append(_conversation(text[:30], text[30:180]))
    return found


def _sweep(folder: Path, base: dict[str, Any], space: dict[str, list[float]], **settings: Any) -> dict[str, Any]:
    """A grid over these values, and from its journal: wall time of the trials, time to the first step, tokens."""
    import raylm

    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    result = raylm.sweep(
        {
            "base": base,
            "dir": str(folder),
            "space": {f"optimizer.{name}": {"choice": values} for name, values in space.items()},
            "search": "grid",
            "export_best": False,
            **settings,
        }
    )
    whole = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    starts = {line["number"]: line["time"] for line in lines if line["event"] == "start"}
    ends = [line["time"] for line in lines if line["event"] == "end"]
    from raylm.tuning.journal import read_journal

    return {
        "seconds": max(ends) - min(starts.values()),
        "whole": whole,
        "start_s": statistics.median(_first_step(folder / "trials" / f"{n:04d}") - at for n, at in starts.items()),
        "value": result.value,
        "tokens": read_journal(folder).tokens,
        "states": result.states,
    }


def _first_step(run_dir: Path) -> float:
    from raylm.training.metrics import read_metrics

    return float(next(line["time"] for line in read_metrics(run_dir)))


def _bare(folder: Path, base: dict[str, Any], count: int) -> list[float]:
    """Seconds of each of so many trainings, one after the other; a first one is not counted."""
    return [_train(base, folder / f"bare-{number}") for number in range(count + 1)][1:]


def _train(base: dict[str, Any], run_dir: Path) -> float:
    import raylm

    started = time.perf_counter()
    raylm.train(base, {"run.dir": str(run_dir), "export.enabled": False})
    return time.perf_counter() - started


def _together(folder: Path, base: dict[str, Any], count: int) -> float:
    """Mean seconds of so many trainings that start at once."""
    with ThreadPoolExecutor(count) as pool:
        return statistics.mean(pool.map(lambda number: _train(base, folder / f"together-{number}"), range(count)))


def _peer(folder: Path, base: dict[str, Any], rates: list[float], concurrency: int) -> dict[str, float]:
    """Plain Ray Tune with a function that calls the trainer, which prepares its own data."""
    from ray import tune

    def trial(settings: dict[str, Any]) -> None:
        import raylm

        config = settings["one"]
        overrides = {"run.dir": config["dir"], "export.enabled": False, "optimizer.learning_rate": config["rate"]}
        began = time.time()
        result = raylm.train(base, {**overrides, "data.cache": False})
        tune.report({"value": result.metrics["eval/loss"], "start_s": _first_step(Path(config["dir"])) - began})

    started = time.perf_counter()
    grid = [{"rate": rate, "dir": str(folder / f"peer-{place}")} for place, rate in enumerate(rates)]
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),  # Ray wants something; the trainings take their own
        param_space={"one": tune.grid_search(grid)},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrency),
        run_config=tune.RunConfig(storage_path=str(folder / "peer-tune"), verbose=0),
    )
    results = tuner.fit()
    starts = [one.metrics["start_s"] for one in results if one.metrics and "start_s" in one.metrics]
    assert len(starts) == len(rates), "the peer's trials failed"
    return {"seconds": time.perf_counter() - started, "start_s": statistics.median(starts)}


def main() -> None:
    """Runs the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--bare", type=int, default=3, help="bare trainings")
    parser.add_argument("--peer", type=int, default=4, help="trials of plain Ray Tune, 0 for none")
    parser.add_argument("--steps", type=int, default=600, help="of each trial, 60 ms each")
    parser.add_argument("--asha-steps", type=int, default=120)
    parser.add_argument("--only", choices=["overhead", "asha"], help="parts 1 and 2, or 3")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import raylm

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["RAYLM_DATA_CACHE"] = str(folder / "cache")
        with raylm.session(num_cpus=2 * options.concurrency + 1):
            if options.only != "asha":
                rows = _questions()
                _measure(folder, _base(folder / "questions", options.steps, rows, rows[:16]), options, result)
            if options.only != "overhead":
                rows = _paragraphs()
                base = _base(folder / "docs", options.asha_steps, [*rows[1::4], *rows[2::4], *rows[3::4]], rows[::4])
                _measure_asha(folder, base, options, result)
    print(json.dumps(result))


def _rates(count: int) -> list[float]:
    """Equal distances of logarithms, from too low to too high."""
    return [10 ** (-4.5 + 3 * place / count) for place in range(count)]


def _measure(folder: Path, base: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]) -> None:
    concurrency, rates = options.concurrency, _rates(options.trials)
    full = _sweep(folder / "sweep", base, {"learning_rate": rates}, concurrency=concurrency)
    print(f"sweep: {full}", flush=True)
    bare = _bare(folder, base, options.bare)
    mean = statistics.mean(bare)
    print(f"bare trainings: {', '.join(f'{one:.1f}' for one in bare)} s", flush=True)
    result["overhead"] = round(full["seconds"] / (mean * options.trials / concurrency), 3)
    result["together"] = round(_together(folder, base, concurrency) / mean, 3)
    result["start_s"], result["bare_s"] = round(full["start_s"], 2), round(mean, 2)
    result["trials_s"], result["whole_s"] = round(full["seconds"], 1), round(full["whole"], 1)
    if options.peer:
        peer = _peer(folder, base, rates[: options.peer], concurrency)
        print(f"plain Ray Tune: {peer}", flush=True)
        share = full["whole"] * options.peer / options.trials
        result["peer_s"] = round(peer["seconds"] / share, 2)
        result["peer_start_s"] = round(peer["start_s"], 2)


def _measure_asha(folder: Path, base: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]) -> None:
    space, concurrency = {"learning_rate": _rates(8), "weight_decay": [0.0, 0.01, 0.1]}, options.concurrency
    full = _sweep(folder / "grid", base, space, concurrency=concurrency)
    print(f"grid: {full}", flush=True)
    scheduler = {"name": "asha", "reduction_factor": 3, "grace_steps": max(1, options.asha_steps // 8)}
    asha = _sweep(folder / "asha", base, space, concurrency=concurrency, scheduler=scheduler)
    print(f"ASHA: {asha}", flush=True)
    result["asha_tokens"] = round(asha["tokens"] / full["tokens"], 3)
    result["asha_loss"] = round(asha["value"] / full["value"], 4)


if __name__ == "__main__":
    main()
