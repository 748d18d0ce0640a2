"""`raylm`: parse, load the configuration, call one function.

Exit code 0: done; 2: a fault the user can mend, in one line; 3: done, but for rows that could not be answered; 1: a
bug, with its traceback. With --json the result is one JSON object on stdout, and everything else goes to stderr.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import raylm
from raylm.errors import ConfigError, RaylmError, nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("ray", "httpx", "matplotlib", "torch", "transformers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code: int = options.run(options) or 0
    except RaylmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    return code


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line. What argparse leaves over behind an option goes where it would have gone before
    it: prompts, or settings. Exits with a usage message for anything else."""
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    place = next((name for name in ("prompts", "overrides") if name in options), None)
    odd = [item for item in extra if item.startswith("-") or ("=" not in item and place != "prompts")]
    if extra and (odd or place is None):
        parser.error(f"unrecognized arguments: {' '.join(odd or extra)}")
    if place is not None:
        setattr(options, place, [*getattr(options, place), *extra])
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raylm", description="Fine-tune, evaluate and serve large language models on Ray."
    )
    parser.add_argument("--version", action="version", version=f"raylm {raylm.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = _command(commands, "train", _train, "fine-tune a model as a YAML file says")
    train.add_argument("config", help="YAML configuration")
    _overrides(train)
    plan = _command(commands, "plan", _plan, "say what a run would take, and check it, before anything starts")
    plan.add_argument("config", help="YAML configuration")
    plan.add_argument("--tokens-per-second", type=float, metavar="X", help="measured rate of all ranks, for the time")
    plan.add_argument("--utilisation", type=float, default=0.4, metavar="X", help="MFU to assume (default 0.4)")
    plan.add_argument("--memory-gib", type=float, metavar="X", help="memory of each rank (default: this machine's)")
    _overrides(plan)
    sweep = _command(commands, "sweep", _sweep, "train over a space of settings and keep the best")
    sweep.add_argument("config", nargs="?", help="YAML of the sweep")
    sweep.add_argument("--set", action="append", default=[], metavar="key=value", help="setting of all trials")
    sweep.add_argument("--resume", metavar="DIR", help="continue the sweep in this folder")
    sweep.add_argument("--retry-failed", action="store_true", help="with --resume: failed trials go on as well")
    sweep.add_argument("--dry-run", action="store_true", help="check everything, say what would run, start nothing")
    _overrides(sweep)
    serve = _command(commands, "serve", _serve, "host a model behind an OpenAI-compatible endpoint")
    serve.add_argument("model", help="hub id, folder, GGUF file, or YAML of a server")
    serve.add_argument("--adapter", metavar="DIR", help="LoRA adapter to serve beside the model")
    _overrides(serve)
    deploy = _command(commands, "deploy", _deploy, "host a model on a running cluster, or replace what is deployed")
    deploy.add_argument("model", nargs="?", help="hub id, folder, GGUF file, or YAML of a server")
    others = deploy.add_mutually_exclusive_group()
    others.add_argument("--status", action="store_true", help="say what is deployed")
    others.add_argument("--rollback", action="store_true", help="put the former version back")
    others.add_argument("--delete", action="store_true", help="end what is deployed")
    _overrides(deploy)
    chat = _command(commands, "chat", _chat, "talk to a model or a running server in the terminal")
    chat.add_argument("target", metavar="MODEL_OR_URL", help="hub id, folder, GGUF file, or http://… of a server")
    chat.add_argument("--adapter", metavar="DIR", help="LoRA adapter to talk to (of a running server: its name)")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    chat.add_argument("--api-key-file", help="file with the key the server asks for")
    _overrides(chat)
    speculate = commands.add_parser("speculate", help="measure speculative decoding").add_subparsers(
        required=True, metavar="COMMAND"
    )
    bench = _command(speculate, "bench", _bench, "serve a model without and with speculation, and compare")
    bench.add_argument("model", help="hub id, folder, GGUF file, or YAML of a server")
    bench.add_argument(
        "--data", action="append", default=[], metavar="FILE", help="dataset to ask (default: edit tasks)"
    )
    bench.add_argument("--concurrency", default="1,16,64", metavar="N,…", help="requests at a time (default 1,16,64)")
    bench.add_argument("--max-tokens", type=int, default=128, metavar="N", help="length of an answer (default 128)")
    _overrides(bench)
    generate = _command(commands, "generate", _generate, "answer prompts or a dataset into JSONL or Parquet, resumable")
    generate.add_argument("model", help="hub id, folder, or GGUF file")
    generate.add_argument("--adapter", metavar="DIR", help="LoRA adapter to answer with")
    generate.add_argument("prompts", nargs="*", help="prompts; key=value sets an option", metavar="PROMPT|key=value")
    distill = _command(commands, "distill-draft", _distill, "make and train a draft for speculative decoding")
    distill.add_argument("model", help="model to draft for: hub id, folder, or GGUF file")
    distill.add_argument("--data", action="append", required=True, metavar="FILE", help="dataset with prompts")
    distill.add_argument("--output", required=True, help="folder for the draft")
    distill.add_argument("--layers", metavar="N,…", help="blocks of the model to take, such as 0,10,19,29")
    distill.add_argument("--num-layers", type=int, metavar="N", help="blocks to take (default: an eighth)")
    distill.add_argument("--hidden-size", type=int, metavar="N", help="width of a new draft, in place of blocks")
    _overrides(distill)
    data = commands.add_parser("data", help="look at datasets").add_subparsers(required=True, metavar="COMMAND")
    preview = _command(data, "preview", _preview, "show what the model will see; tokens that carry loss are marked")
    preview.add_argument("config", help="YAML configuration")
    preview.add_argument("--rows", type=int, default=3, help="rows to show (default 3)")
    _overrides(preview)
    stats = _command(data, "stats", _stats, "count tokens, loss, padding, the longest rows and duplicates")
    stats.add_argument("config", help="YAML configuration")
    stats.add_argument("--histogram", help="PNG file for the lengths")
    _overrides(stats)
    convert = _command(data, "convert", _convert, "write a dataset as LMFlow .json, OpenAI .jsonl or .parquet")
    convert.add_argument("source", help="file, folder, pattern, address or hf://ORG/NAME")
    convert.add_argument("target", help="file to write; its ending names the format")
    convert.add_argument("--format", default="auto", help="shape of the rows (default: recognised by their keys)")
    convert.add_argument("--columns", nargs="+", default=[], metavar="KEY=NAME", help="key of the format=its name here")
    prepare = _command(data, "prepare", _prepare, "tokenise the datasets into the cache")
    prepare.add_argument("config", help="YAML configuration")
    _overrides(prepare)
    _command(data, "templates", _templates, "list the conversation templates and formats")
    vocabulary = commands.add_parser("vocab", help="change vocabularies").add_subparsers(
        required=True, metavar="COMMAND"
    )
    extend = _command(vocabulary, "extend", _extend, "add learnt pieces and tokens to a tokenizer and its model")
    extend.add_argument("model", help="hub id, folder, or GGUF file")
    extend.add_argument("--output", required=True, help="folder for the extended model")
    extend.add_argument("--corpus", nargs="+", metavar="FILE", help="datasets to learn pieces from, in any format")
    extend.add_argument("--size", type=int, metavar="N", help="pieces to learn")
    extend.add_argument("--min-frequency", type=int, metavar="N", help="tokens of the corpus a piece must save")
    extend.add_argument("--tokens", metavar="FILE", help="texts that become one token each: one a line, or a JSON list")
    extend.add_argument("--special", nargs="+", metavar="TOKEN", help="control tokens, such as '<|act|>'")
    extend.add_argument(
        "--pad-to-multiple-of", type=int, metavar="K", help="fill the rows up to a multiple with pieces"
    )
    metrics = commands.add_parser("metrics", help="watch servers").add_subparsers(required=True, metavar="COMMAND")
    board = _command(metrics, "dashboard", _dashboard, "print the Grafana dashboard of a server")
    board.add_argument("--output", metavar="FILE", help="file to write instead")
    optimizers = commands.add_parser("optim", help="look at optimizers").add_subparsers(
        required=True, metavar="COMMAND"
    )
    _command(optimizers, "list", _optimizers, "list the optimizers, what they keep and where they work")
    adapter = commands.add_parser("adapter", help="work with LoRA adapters").add_subparsers(
        required=True, metavar="COMMAND"
    )
    merge = _command(adapter, "merge", _merge, "write an adapter and its base as one model folder")
    merge.add_argument("adapter", help="adapter folder, such as RUN/adapter")
    merge.add_argument("--output", required=True, help="folder for the model")
    merge.add_argument("--base", help="base model (default: the one the adapter names)")
    checkpoints = _command(commands, "checkpoints", _checkpoints, "list the checkpoints of a run and verify them")
    checkpoints.add_argument("run_dir", metavar="RUN", help="run directory")
    runs = _command(commands, "runs", _runs, "list the runs under a folder, and the settings in which they differ")
    runs.add_argument("folder", nargs="?", default="runs", help="default: runs")
    runs.add_argument("--sort", default="run", metavar="COLUMN", help="smallest first, such as eval_loss")
    report = _command(commands, "report", _report, "write report.md and report.html of a run, unfinished or not")
    report.add_argument("run_dir", metavar="RUN", help="run directory")
    track = _command(commands, "track", _track, "send trackers what they lack of a run that is over")
    track.add_argument("run_dir", metavar="RUN", help="run directory")
    _overrides(track)
    config = commands.add_parser("config", help="look at configurations").add_subparsers(
        required=True, metavar="COMMAND"
    )
    show = _command(config, "show", _show, "print the resolved configuration")
    show.add_argument("config", help="YAML configuration")
    _overrides(show)
    return parser


def _command(group: Any, name: str, run: Callable[[Any], int | None], summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = group.add_parser(name, help=summary, description=summary.capitalize() + ".")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    command.set_defaults(run=run)
    return command


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")


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


def _serve(options: Any) -> None:
    with raylm.serve(options.model, _with_adapter(options)) as server:
        model = server.adapter or server.model
        if options.json:
            page = {"chat_page": server.chat_page} if server.chat_page else {}
            print(json.dumps({"url": server.url, "model": model, **page}), flush=True)
        else:
            print(f"{model} is served at {server.url}/v1 (ctrl-c stops it). Try:", flush=True)
            print(_curl(server.url, model), flush=True)
            if server.chat_page:
                print(f"Chat page: {server.chat_page}", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)


def _dashboard(options: Any) -> None:
    from raylm.serving.dashboard import dashboard

    text = json.dumps(dashboard(), indent=2)
    if options.output is None:
        print(text)
        return
    Path(options.output).write_text(text + "\n", encoding="utf-8")
    print(json.dumps({"output": options.output}) if options.json else f"dashboard       {options.output}")


def _bench(options: Any) -> None:
    counts = options.concurrency.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise ConfigError("--concurrency", f"{options.concurrency} is not a list of counts, such as 1,16,64.")
    result = raylm.bench_speculation(
        options.model,
        options.overrides,
        data=options.data,
        concurrencies=[int(count) for count in counts],
        max_tokens=options.max_tokens,
    )
    from raylm.serving.speculation_bench import as_json, table_lines

    print(json.dumps(as_json(result)) if options.json else "\n".join(table_lines(result)))


def _with_adapter(options: Any) -> list[str]:
    """The settings of a command with its --adapter among them."""
    return [*([f"adapter={json.dumps(options.adapter)}"] if options.adapter else []), *options.overrides]


def _deploy(options: Any) -> None:
    given = [item for item in (options.model, *options.overrides) if item is not None]
    if not (options.status or options.rollback or options.delete):
        if not given or "=" in given[0]:
            raise ConfigError("raylm deploy", "has no model.", "Give a model, or --status, --rollback or --delete.")
        _print_deployment(raylm.deploy(given[0], given[1:]), as_json=options.json)
        return
    from raylm.serving import delete, deployed, roll_back

    unknown = next((item for item in given if not item.startswith("cluster_address=")), None)
    if unknown is not None:
        raise ConfigError(unknown, "goes with a new version.", "Only cluster_address=… goes with this option.")
    address = given[-1].partition("=")[2] if given else None
    if options.delete:
        delete(address)
        print(json.dumps({"deleted": True}) if options.json else "deleted")
    else:
        _print_deployment(roll_back(address) if options.rollback else deployed(address), as_json=options.json)


def _print_deployment(found: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(f"address         {found.url}/v1")
    print(f"revision        {found.revision}, {found.status}")
    print(*(f"model           {', '.join(names)}" for names in found.models), sep="\n")
    print(f"replicas        {', '.join(f'{name} {count}' for name, count in found.replicas.items())}")
    if found.before:
        print("go back         raylm deploy --rollback")


def _curl(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"


def _chat(options: Any) -> None:
    from raylm.inference.chat import chat_in_terminal
    from raylm.serving.api_key import read_api_key

    key = read_api_key(options.api_key_file)
    if options.target.startswith(("http://", "https://")):
        if options.overrides:
            raise ConfigError(options.overrides[0], "is a setting of a server, and this one runs already.")
        chat_in_terminal(
            options.target,
            api_key=key,
            system=options.system,
            max_tokens=options.max_tokens,
            model=options.adapter,
        )
        return
    with raylm.serve(options.target, _with_adapter(options)) as server:
        from raylm.data.prompt import PromptEncoder
        from raylm.data.tokenizer import load_tokenizer
        from raylm.models.folder import as_folder

        prompts = PromptEncoder(load_tokenizer(as_folder(options.target)), options.target)
        chat_in_terminal(
            server.url,
            api_key=key,
            system=options.system,
            max_tokens=options.max_tokens,
            prompts=prompts,
            model=server.adapter,
        )


def _generate(options: Any) -> int:
    settings = [item for item in options.prompts if _is_setting(item)]
    prompts = [item for item in options.prompts if not _is_setting(item)]
    given = {"prompts": prompts, "adapter": options.adapter}
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it does about a lost worker
        result = raylm.generate({"model": options.model, **{k: v for k, v in given.items() if v}}, settings)
    failed = sum(result.failed.values())
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.failed.items())
        rate = f" ({result.tokens_per_second:.0f} tokens/s)" if result.tokens_per_second else ""
        print(f"{result.prompts - failed} answers, {result.tokens} tokens{rate}: {result.output}")
        if failed:
            print(f"{failed} rows failed, with their reasons in the output: {kinds}", file=sys.stderr)
    return 3 if failed else 0


def _distill(options: Any) -> None:
    names = ("model", "data", "output", "num_layers", "hidden_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.layers is not None:
        given["layers"] = options.layers.split(",")
    result = raylm.distill_draft(given, options.overrides)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"draft           {result.output}")
    print(f"parameters      {result.parameters / 1e6:.1f} million, the model has {result.target_parameters / 1e6:.1f}")
    for name, found in (("before", result.before), ("after", result.after)):
        rate, length = found["acceptance_rate"] or 0.0, found["mean_accepted_length"] or 1.0
        print(f"accepted {name:7}{rate:.1%} of the guesses, {length:.2f} tokens a step")
    print(f"a guess costs   {result.cost_ratio:.2f} of a token of the model")
    print(f"speed-up        {result.predicted_speed_up:.2f} predicted, {result.measured_speed_up:.2f} measured")
    print(f"same answers    {result.same_answers:.0%}")
    print(f"serve the pair  {result.serve}")


def _is_setting(item: str) -> bool:
    """Whether an argument of `raylm generate` sets something. Raises ConfigError for a name that is nearly one."""
    import difflib
    import re

    from raylm.config import GenerateConfig

    key, sign, _ = item.partition("=")
    first = key.split(".")[0]
    if not sign or first in GenerateConfig.model_fields:
        return bool(sign)
    near = difflib.get_close_matches(first, GenerateConfig.model_fields, n=1, cutoff=0.8)
    if near and re.fullmatch(r"[\w.-]+", key):
        raise ConfigError(item, f"is neither a setting nor plainly a prompt. Did you mean {near[0]}?")
    return False


def _preview(options: Any) -> None:
    from raylm.config import TrainConfig, load_config
    from raylm.data.preview import preview_rows

    config = load_config(TrainConfig, options.config, options.overrides)
    rows = list(preview_rows(config.data, _tokenizer_source(config), count=options.rows))
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        carrying = sum(loss for _, _, loss in row.tokens)
        console.print(f"[bold]{row.where}[/bold]  {len(row.tokens)} tokens, {carrying} carry loss")
        if row.problem:
            console.print(f"rejected: {row.problem}", style="red")
            continue
        text = Text()
        for _, piece, loss in row.tokens:
            text.append(piece, style="black on green" if loss else "dim")
        if not console.is_terminal:  # nothing is coloured there
            text = Text("".join(f"{edge}{piece}" for edge, piece in _with_edges(row.tokens)))
        console.print(text)


def _with_edges(tokens: Sequence[tuple[int, str, bool]]) -> Iterator[tuple[str, str]]:
    """Pieces with what stands before them: where loss begins and ends."""
    inside = False
    for _, piece, loss in [*tokens, (0, "", False)]:
        yield ("⟦" if loss else "⟧") if loss != inside else "", piece
        inside = loss


def _stats(options: Any) -> None:
    from pathlib import Path

    from raylm.config import TrainConfig, load_config
    from raylm.data.stats import data_stats

    config = load_config(TrainConfig, options.config, options.overrides)
    target = Path(options.histogram) if options.histogram else None
    found = dataclasses.asdict(data_stats(config.data, _tokenizer_source(config), histogram=target))
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        if isinstance(value, list):
            print(f"{key}:", *(f"  {place}  {what}" for place, what in value), sep="\n")
        else:
            print(f"{key:20}{value}")


def _convert(options: Any) -> None:
    from pathlib import Path

    from raylm.config.data import DataSection
    from raylm.config.load import load_config
    from raylm.data.convert import convert

    columns = dict(item.split("=", 1) for item in options.columns if "=" in item)
    if len(columns) != len(options.columns):
        raise ConfigError("--columns", "takes pairs such as question=q answer=a.")
    source = {"path": options.source, "format": options.format, "columns": columns}
    section = load_config(DataSection, {"train": [source]})
    rows = convert(section, Path(options.target))
    print(json.dumps({"rows": rows, "target": options.target}) if options.json else f"{rows} rows: {options.target}")


def _prepare(options: Any) -> None:
    import os

    from raylm.config import TrainConfig, load_config
    from raylm.data.store import tokenize_files
    from raylm.ray_session import ray_session

    config = load_config(TrainConfig, options.config, options.overrides)
    source = _tokenizer_source(config)
    summaries: dict[str, Any] = {}
    with ray_session(config.cluster.address, num_cpus=os.cpu_count() or 1):
        for name, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if sources:
                _, report = tokenize_files(sources, config.data, source, seed=config.run.seed)
                section = config.data
                report.check(name, on_bad_row=section.on_bad_row, max_bad_share=section.max_bad_share)
                summaries[name] = report.summary()
                print(f"{name}: {report.describe()}", file=sys.stderr)
    if options.json:
        print(json.dumps(summaries))


def _templates(options: Any) -> None:
    from raylm.data.formats import FORMATS
    from raylm.data.templates import PRESETS

    if options.json:
        print(json.dumps({"templates": list(PRESETS), "formats": list(FORMATS)}))
        return
    print("data.template: auto (the tokenizer's own), a YAML file, one line with {input_text}, or one of")
    print(*(f"  {name:24}{row.source}" for name, row in PRESETS.items()), sep="\n")
    print("format of a dataset: auto (by the keys of each row), or one of")
    print(*(f"  {name:24}{form.summary}" for name, form in FORMATS.items()), sep="\n")


def _optimizers(options: Any) -> None:
    from raylm.optim.listing import optimizer_facts, table_lines

    print(json.dumps(optimizer_facts()) if options.json else "\n".join(table_lines()))


def _extend(options: Any) -> None:
    from pathlib import Path

    from raylm.data.texts import read_token_list

    names = ("model", "output", "corpus", "size", "min_frequency", "special", "pad_to_multiple_of")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.tokens:
        given["tokens"] = read_token_list(Path(options.tokens))
    result = raylm.extend_vocabulary(given)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"model           {result.output}")
    print(f"new tokens      {result.tokens} given, {result.pieces} learnt, ids from {result.first_new_id}")
    print(f"rows            {result.rows_before} before, {result.rows} now")


def _merge(options: Any) -> None:
    result = raylm.merge_adapter(options.adapter, options.output, base=options.base)
    print(json.dumps(dataclasses.asdict(result)) if options.json else f"model           {result.output}")


def _tokenizer_source(config: Any) -> Any:
    from raylm.data.store import TokenizerSource
    from raylm.models.folder import as_folder

    section = config.model
    folder = as_folder(section.path, section.revision)
    return TokenizerSource(folder, section.path, section.revision, section.trust_remote_code)


def _show(options: Any) -> None:
    from raylm.config import TrainConfig, dump_yaml, load_config

    config = load_config(TrainConfig, options.config, options.overrides)
    print(
        json.dumps(config.model_dump(mode="json")) if options.json else dump_yaml(config),
        end="\n" if options.json else "",
    )


if __name__ == "__main__":
    sys.exit(main())
