"""Every optimizer under every strategy: the losses of one process, or a refusal before the start.

`pytest -m slow tests/training/test_optimizer_matrix.py --write-docs` writes what it found into docs/optimizers.md.
"""

from pathlib import Path

import pytest

from raylm.errors import ConfigError
from raylm.optim.checks import check_optimizer_use
from raylm.optim.table import OPTIMIZERS
from tests.training.cells import CELLS, LISA, config_of, losses
from tests.training.ranks import ranks

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end matrix -->\n"
TOLERANCE = 1e-4
REFUSED_NOWHERE = ("adamw", "lion", "adafactor", "lamb", "muon", "sophia")


def _refused(model: Path, name: str, cell: str) -> bool:
    try:
        check_optimizer_use(config_of(model, name, CELLS[cell]))
    except ConfigError:
        return True
    return False


def _lines(found: dict[str, dict[str, float | None]]) -> list[str]:
    """found: the largest relative difference of a loss, by optimizer and cell; None for what is refused."""
    lines = [f"| optimizer | {' | '.join(CELLS)} |", "|---" * (len(CELLS) + 1) + "|"]
    for name, row in found.items():
        cells = [
            "the reference" if cell == "single" else "refused" if row[cell] is None else f"{row[cell]:.0e}"
            for cell in CELLS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _documented() -> dict[str, list[str]]:
    table = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_docs_have_every_optimizer_and_its_refusals(tiny_model_dir: Path) -> None:
    rows = _documented()
    assert rows.keys() == OPTIMIZERS.keys()
    for name, cells in rows.items():
        assert [cell == "refused" for cell in cells] == [_refused(tiny_model_dir, name, cell) for cell in CELLS], name


def test_few_are_refused(tiny_model_dir: Path) -> None:
    refused = [(name, cell) for name in OPTIMIZERS for cell in CELLS if _refused(tiny_model_dir, name, cell)]
    assert len(refused) * 10 <= len(OPTIMIZERS) * len(CELLS)
    assert not {name for name, _ in refused} & set(REFUSED_NOWHERE)


@pytest.mark.slow
def test_every_optimizer_takes_the_steps_of_one_process(tiny_model_dir: Path, request: pytest.FixtureRequest) -> None:
    model = str(tiny_model_dir)
    works = {cell: [name for name in OPTIMIZERS if not _refused(tiny_model_dir, name, cell)] for cell in CELLS}
    alone = losses(0, 1, model, (), works["single"])
    for name, curve in alone.items():
        assert sum(curve[-2:]) < sum(curve[:2]), f"{name} learns nothing"
    alone_lisa = losses(0, 1, model, LISA, works["lisa"])
    found: dict[str, dict[str, float | None]] = {name: dict.fromkeys(CELLS) for name in OPTIMIZERS}
    for cell in CELLS:
        expected = alone_lisa if cell == "lisa" else alone
        with ranks(2) as pool:  # one process group for a column
            curves = pool.run(2, losses, model, CELLS[cell], works[cell]) if cell != "single" else [alone]
        for name in works[cell]:
            pairs = [pair for curve in curves for pair in zip(curve[name], expected[name], strict=True)]
            found[name][cell] = max(abs(left / right - 1) for left, right in pairs)
    if request.config.getoption("--write-docs"):
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(before + BEGIN + "\n".join(_lines(found)) + "\n" + END + rest.partition(END)[2])
    wrong = {
        (name, cell): value
        for name, row in found.items()
        for cell, value in row.items()
        if value is not None and not value <= TOLERANCE
    }
    assert not wrong
