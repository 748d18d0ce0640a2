"""The table of optimizers as text: for `raylm optim list` and docs/optimizers.md. Imports no optimizer."""

from collections.abc import Mapping
from typing import Any

from raylm.optim.table import OPTIMIZERS, STRATEGIES, OptimizerRow, excluded_strategies

HEADER = ("name", "state", "decay", "rates to try", "strategies", "LISA", "source")


def optimizer_facts() -> list[dict[str, Any]]:
    """One mapping a row, as `raylm optim list --json` prints it."""
    return [_facts(name, row) for name, row in OPTIMIZERS.items()]


def table_lines() -> list[str]:
    """Columns of plain text."""
    cells = [HEADER, *(_cells(facts) for facts in optimizer_facts())]
    widths = [max(len(row[place]) for row in cells) for place in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def markdown_lines() -> list[str]:
    """The same as a Markdown table, and a list of defaults and notes."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    lines += [f"| {' | '.join(_cells(facts))} |" for facts in optimizer_facts()]
    lines.append("")
    for facts in optimizer_facts():
        options = ", ".join(f"`{key}={_value(value)}`" for key, value in facts["options"].items())
        note = f"; {facts['note']}" if facts["note"] else "."
        lines.append(f"- **{facts['name']}** (`{facts['factory']}`): {options}{note}")
    return lines


def _facts(name: str, row: OptimizerRow) -> dict[str, Any]:
    return {
        "name": name,
        "factory": row.factory,
        "source": row.source,
        "options": row.options,
        "learning_rates": row.learning_rates,
        "decay": row.decay,
        "state": _state(row),
        "needs_whole": row.whole,
        "strategies": [strategy for strategy in STRATEGIES if strategy not in excluded_strategies(row)],
        "lisa": not (row.averages or row.paged),
        "note": row.note,
    }


def _cells(facts: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = facts["learning_rates"]
    everywhere = len(facts["strategies"]) == len(STRATEGIES)
    return (
        facts["name"],
        facts["state"],
        facts["decay"],
        f"{low:g} to {high:g}",
        "all" if everywhere else ", ".join(facts["strategies"]),
        "yes" if facts["lisa"] else "no",
        facts["source"],
    )


def _state(row: OptimizerRow) -> str:
    """Numbers for each weight of a matrix, of 32 bits where nothing else is said."""
    full = str(row.state_full) if row.state_full else ""
    if row.state_bits != 32:
        full += f" of {row.state_bits} bits"
    low = f"{row.state_low_rank} (rank x longer side) + rank x shorter" if row.state_low_rank else ""
    parts = {
        "rows + columns": row.state_vectors,
        "rows": row.state_rows,
        "rows x rows + columns x columns": row.state_squares,
    }
    shown = [what if number == 1 else f"{number} ({what})" for what, number in parts.items() if number]
    return " + ".join(filter(None, (full, *shown, low)))


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
