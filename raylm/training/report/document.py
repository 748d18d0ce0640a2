"""A report as a list of sections, written as Markdown and as HTML. All text comes in plain and is escaped here."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells. Without headings the first cell of each row is its heading."""

    rows: Sequence[Sequence[str]]
    headings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Code:
    """Text as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A sentence or two."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG. file: its name beside the report, for Markdown; alt: what it shows."""

    png: bytes
    file: str
    alt: str


Block = Table | Code | Paragraph | Picture


@dataclass(frozen=True, slots=True)
class Part:
    """A section of a report."""

    title: str
    blocks: Sequence[Block]


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    """GitHub's Markdown; pictures are named by their files."""
    lines = [f"# {_plain(title)}", ""]
    for part in parts:
        lines += [f"## {_plain(part.title)}", ""]
        for block in part.blocks:
            lines += [*_markdown(block), ""]
    return "\n".join(lines)


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One page that needs nothing from elsewhere: pictures are in it, and there is no script."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for part in parts:
        body += [f"<h2>{html.escape(part.title)}</h2>", *(_html(block) for block in part.blocks)]
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _markdown(block: Block) -> list[str]:
    match block:
        case Table(rows, headings):
            width = max(len(row) for row in rows)
            lines = [headings or [""] * width, ["---"] * width, *rows]
            escaped = [list(map(_plain, cells)) if cells != ["---"] * width else cells for cells in lines]
            return [f"| {' | '.join(cells)} |" for cells in escaped]
        case Code(text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return [fence, text.rstrip("\n"), fence]
        case Paragraph(text):
            return [_plain(text)]
        case Picture(_, file, alt):
            return [f"![{_plain(alt)}]({file})"]


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands, in one line."""
    escaped = re.sub(r"([\\`*\[\]<>#|~!&])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\g<0>", text)
    return " ".join(escaped.split())


def _html(block: Block) -> str:
    match block:
        case Table(rows, headings):
            head = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in headings)}</tr>" if headings else ""
            return f"<table>{head}{''.join(_row(row, first_is_heading=not headings) for row in rows)}</table>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Picture(png, _, alt):
            data = base64.b64encode(png).decode()
            return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _row(cells: Sequence[str], *, first_is_heading: bool) -> str:
    first = f"<th>{html.escape(cells[0])}</th>" if first_is_heading else f"<td>{html.escape(cells[0])}</td>"
    return f"<tr>{first}{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells[1:])}</tr>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 0.5rem 0; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.15rem 1rem 0.15rem 0; border-bottom: 1px solid #ddd;
  overflow-wrap: anywhere; }}
th {{ font-weight: 600; }}
pre {{ background: #f6f6f6; padding: 0.7rem; overflow-x: auto; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
