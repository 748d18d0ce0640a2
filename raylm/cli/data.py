"""data preview, stats, convert, prepare, templates: datasets before any training."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raylm.cli.arguments import add_command, add_group, add_overrides
from raylm.errors import ConfigError


def add(commands: Any) -> None:
    """Declares the commands of data."""
    data = add_group(commands, "data", "look at datasets")
    preview = add_command(data, "preview", _preview, "show what the model will see; tokens that carry loss are marked")
    preview.add_argument("config", help="YAML configuration")
    preview.add_argument("--rows", type=int, default=3, help="rows to show (default 3)")
    add_overrides(preview)
    stats = add_command(data, "stats", _stats, "count tokens, loss, padding, the longest rows and duplicates")
    stats.add_argument("config", help="YAML configuration")
    stats.add_argument("--histogram", help="PNG file for the lengths")
    add_overrides(stats)
    convert = add_command(data, "convert", _convert, "write a dataset as LMFlow .json, OpenAI .jsonl or .parquet")
    convert.add_argument("source", help="file, folder, pattern, address or hf://ORG/NAME")
    convert.add_argument("target", help="file to write; its ending names the format")
    convert.add_argument("--format", default="auto", help="shape of the rows (default: recognised by their keys)")
    convert.add_argument("--columns", nargs="+", default=[], metavar="KEY=NAME", help="key of the format=its name here")
    prepare = add_command(data, "prepare", _prepare, "tokenise the datasets into the cache")
    prepare.add_argument("config", help="YAML configuration")
    add_overrides(prepare)
    add_command(data, "templates", _templates, "list the conversation templates and formats")


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


def _tokenizer_source(config: Any) -> Any:
    from raylm.data.store import TokenizerSource
    from raylm.models.folder import as_folder

    section = config.model
    folder = as_folder(section.path, section.revision)
    return TokenizerSource(folder, section.path, section.revision, section.trust_remote_code)
