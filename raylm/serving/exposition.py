"""The metrics of several engines as one page in Prometheus' text format."""

import re
from collections.abc import Iterable

from raylm.serving.metrics import SERVE_PREFIX

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{(.*)\})?(\s.*)$")


def merged(pages: Iterable[tuple[dict[str, str], str]]) -> str:
    """One page of many: each metric is described once, and its samples of all pages stand together.

    pages: labels that tell a page's samples apart, and the page. A label that a sample has already keeps its value.
    Ray Serve's samples are about a whole node and stand on the page of each of its replicas: they get no label, and
    each is there once.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    of_serve: set[str] = set()
    for labels, page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if not any(other.startswith(line[: len("# HELP ")] + family + " ") for other in head):
                    head.append(line)
            elif line.startswith(SERVE_PREFIX):
                named = line[: line.rfind("}") + 1] or line.split()[0]
                if named not in of_serve:
                    of_serve.add(named)
                    samples.setdefault(family, []).append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, labels))
    lines = [
        line for family in dict.fromkeys([*heads, *samples]) for line in heads.get(family, []) + samples.get(family, [])
    ]
    return "\n".join(lines) + "\n" if lines else ""


def _labelled(line: str, labels: dict[str, str]) -> str:
    found = _SAMPLE.match(line)
    if found is None:
        return line
    name, _, own, rest = found.groups()
    known = set(re.findall(r'(\w+)="', own or ""))
    added = [f'{key}="{_escaped(value)}"' for key, value in labels.items() if key not in known]
    inner = ",".join(([own.rstrip(",")] if own else []) + added)
    return f"{name}{{{inner}}}{rest}" if inner else line


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
