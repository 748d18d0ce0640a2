"""The report against the run's own files."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raylm.config import dump_yaml, load_config
from raylm.config.settings import changed_settings, flat_settings
from raylm.config.tree import TrainConfig
from raylm.errors import RunDirError
from raylm.training.checkpoint import list_checkpoints, read_meta
from raylm.training.environment import this_host
from raylm.training.metrics import EventsWriter, read_metrics
from raylm.training.report.document import Code, Paragraph, Part, Picture, Table, to_html, to_markdown
from raylm.training.report.facts import phase_seconds
from raylm.training.report.write import write_report
from tests.training.support import Rows, make_config, make_plan, run_in_process

NASTY = "<script>alert(1)</script> | `x` & *b* [a](javascript:1) \"q' ![p](http://e/x.png) _u_"


class Page(HTMLParser):
    """Tables of a page as lists of cells, its text, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in_cell = False
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("th", "td")

    def rows(self) -> dict[str, list[str]]:
        return {row[0]: row[1:] for table in self.tables for row in table}


@pytest.fixture
def finished(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints and evaluations, as the driver leaves it behind."""
    run_dir = tmp_path / "run"
    rows = Rows()
    config = make_config(
        tiny_model_dir,
        run_dir,
        "training.max_steps=6",
        "checkpoint.interval_steps=3",
        "data.eval=[unused.json]",
        "training.eval_interval_steps=3",
        "metrics.tags=['<b>bold</b>']",
    )
    run_dir.mkdir()
    EventsWriter(run_dir).write("starting Ray")
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    plan = make_plan(config, rows)
    run_in_process(config, rows, evaluation=lambda: rows.stream(plan, 1))
    assert plan.num_steps > 3
    counts: dict[str, Any] = {
        "rows": 30,
        "used": 24,
        "rejected": {"too_long": 4, "no_loss": 2},
        "left_out": 0,
        "sequences": 24,
        "tokens": 4000,
        "loss_tokens": 1000,
        "sources": [
            {"path": "a|b<i>.json", "rows": 20, "used": 16, "tokens": 3000},
            {"path": "c.json", "rows": 10, "used": 8, "tokens": 1000},
        ],
        "num_steps": plan.num_steps,
    }
    (run_dir / "data.json").write_text(json.dumps(counts))
    EventsWriter(run_dir).write("done")
    return run_dir


def test_a_report_says_what_the_files_of_the_run_say(finished: Path) -> None:
    result = write_report(finished)
    page = Page(Path(result.html).read_text())
    rows, lines = page.rows(), list(read_metrics(finished))
    last = [line for line in lines if "train/loss" in line][-1]
    assert rows["state"] == ["done"]
    assert (rows["method"], rows["strategy"], rows["workers"], rows["precision"]) == (
        ["full"],
        ["single"],
        ["1"],
        ["fp32"],
    )
    assert rows["steps"] == [f"{last['step']} of {last['step']}"]
    assert rows["training loss"] == [f"{last['train/loss']:.4g}"]
    assert rows["evaluation loss"] == [f"{lines[-1]['eval/loss']:.4g}"]
    assert rows["tokens of the logged steps"] == [f"{sum(line.get('train/tokens', 0) for line in lines):,}"]
    curves = next(
        table for table in page.tables if table[0] == ["step", "loss", "learning rate", "gradient norm", "tokens/s"]
    )
    assert [row[:2] for row in curves[1:]] == [
        [str(line["step"]), f"{line['train/loss']:.4g}"] for line in lines if "train/loss" in line
    ]
    assert rows["rows rejected"] == ["6 (too_long 4, no_loss 2)"]
    assert (rows["rows read"], rows["rows used"], rows["tokens that carry loss"]) == (["30"], ["24"], ["1,000"])
    assert rows["a|b<i>.json"] == ["20", "16", "75.0%"]
    config = load_config(TrainConfig, finished / "config.yaml")
    changed = next(table for table in page.tables if table[0] == ["setting", "value"])
    assert dict(changed[1:])["optimizer.learning_rate"] == "0.01"
    assert [row[0] for row in changed[1:]] == list(changed_settings(config))
    assert dump_yaml(config) in page.text
    metas = {meta.step: meta for meta in map(read_meta, list_checkpoints(finished / "checkpoints"))}
    best = min(metas.values(), key=lambda meta: meta.eval_loss or 9)
    for step, meta in metas.items():
        assert rows[str(step)][1:] == [f"{meta.eval_loss:.4g}", "best" if meta is best else ""]
    host = this_host()
    assert rows[host.name] == [f"{host.cpu}, {host.cpus} CPUs", f"{host.memory_gib} GiB", "none"]
    assert all(rows[name] == [number] for name, number in host.versions.items())
    assert {"starting Ray", "loading the model", "training", "saving", "evaluating"} <= rows.keys()


def test_html_needs_nothing_and_markdown_names_its_picture(finished: Path) -> None:
    result = write_report(finished)
    page = Page(Path(result.html).read_text())
    assert not {"script", "link", "iframe", "object", "i", "b", "a"} & {tag for tag, _ in page.tags}
    (picture,) = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert base64.b64decode(picture.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "http" not in Path(result.html).read_text().replace("http-equiv", "")
    text = Path(result.markdown).read_text()
    assert re.findall(r"(?<!\\)!\[.*?\]\((.*?)\)", text) == ["curves.png"]
    assert (finished / "curves.png").read_bytes() == base64.b64decode(picture.partition(",")[2])
    assert "| a\\|b\\<i\\>.json | 20 | 16 | 75.0% |" in text


def test_text_of_users_is_shown_as_it_stands() -> None:
    part = Part(NASTY, [Table([[NASTY, NASTY]]), Table([[NASTY]], [NASTY]), Paragraph(NASTY), Code(f"```\n{NASTY}")])
    page = Page(to_html(NASTY, [part]))
    assert page.text.count(NASTY) == 9
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "table", "tr", "th", "td", "p", "pre")
    }
    attribute = Page(to_html("t", [Part("p", [Picture(b"", "f", '"><script>')])]))
    assert next(attributes for tag, attributes in attribute.tags if tag == "img")["alt"] == '"><script>'
    markdown = to_markdown(NASTY, [part])
    outside, code = markdown.split("````")[0], markdown.split("````")[1]
    assert NASTY in code
    assert not re.search(r"(?<!\\)[<`*\[]", outside), "everything that Markdown would read is escaped"
    rendered = _commonmark(outside)
    assert "<script" not in rendered
    assert "<a " not in rendered
    assert "<img" not in rendered
    assert "<em>" not in rendered


def test_a_run_that_died_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    base = {"model": {"path": "m"}, "data": {"train": "d"}, "metrics": {"run_name": "a <name>"}}
    (tmp_path / "config.yaml").write_text(dump_yaml(load_config(TrainConfig, base)))
    page = Page(Path(write_report(tmp_path).html).read_text())
    assert page.rows()["state"] == ["not finished; its last phase: not started"]
    assert "Run a <name>" in page.text
    events = EventsWriter(tmp_path)
    events.write("tokenising")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    page = Page(Path(write_report(tmp_path).html).read_text())
    assert page.rows()["state"] == ["not finished; its last phase: tokenising"]
    assert page.rows()["training loss"] == ["2"]
    (tmp_path / "failure.json").write_text(json.dumps({"kind": "TrainingError", "arguments": ["step 3", "is nan", ""]}))
    assert Page(Path(write_report(tmp_path).html).read_text()).rows()["state"] == ["failed: step 3: is nan"]
    (tmp_path / "config.yaml").write_text("model: {path: m}\nof_the_future: 1\n")
    page = Page(Path(write_report(tmp_path).html).read_text())
    assert "of_the_future: 1" in page.text
    with pytest.raises(RunDirError, match="holds no run"):
        write_report(tmp_path / "hosts")


def test_wall_time_leaves_out_the_time_between_sessions() -> None:
    def event(phase: str, time: float) -> dict[str, Any]:
        return {"phase": phase, "time": time}

    events = [
        event("starting Ray", 0),
        event("training", 10),
        event("saving", 30),
        event("training", 32),
        event("starting Ray", 1000),
        event("training", 1005),
        event("done", 1025),
        event("starting Ray", 2000),
        event("training", 2001),
    ]
    steps = [{"step": 1, "time": 20.0}, {"step": 2, "time": 40.0}, {"step": 3, "time": 2004.0}]
    assert phase_seconds(events, steps) == {"starting Ray": 16.0, "training": 20 + 8 + 20 + 3, "saving": 2.0}


def test_settings_as_a_list(tmp_path: Path) -> None:
    sources = ["d", {"path": "e", "weight": 2}]
    base = {"model": {"path": "m"}, "data": {"train": sources}, "training": {"method": "lora"}, "lora": {"rank": 16}}
    config = load_config(TrainConfig, base, ["optimizer.learning_rates={head: 0.1}", "training.num_epochs=1"])
    assert changed_settings(config) == {
        "model.path": "m",
        "data.train": [{"path": "d"}, {"path": "e", "weight": 2.0}],
        "training.method": "lora",
        "optimizer.learning_rates": {"head": 0.1},
    }
    flat = flat_settings(config)
    assert (flat["lora.rank"], flat["lisa"], flat["optimizer.learning_rates"]) == (16, None, {"head": 0.1})


def _commonmark(text: str) -> str:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"linkify": False}).enable("table").render(text)
