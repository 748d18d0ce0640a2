"""Every optimizer under every strategy: the losses of one process, or a refusal before the start.

`pytest -m slow tests/training/test_optimizer_matrix.py --write-docs` writes what it found into docs/optimizers.md;
`--optimizers=lamb,soap` does some rows.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

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


def _documented() -> dict[str, list[str]]:
    table = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def _write(cell: str, found: dict[str, float]) -> None:
    """A column of the table: largest relative differences; other rows stay."""
    rows, place = _documented(), list(CELLS).index(cell)
    lines = [f"| optimizer | {' | '.join(CELLS)} |", "|---" * (len(CELLS) + 1) + "|"]
    for name in OPTIMIZERS:
        cells = rows.get(name, ["refused"] * len(CELLS))
        if name in found:
            cells[place] = "the reference" if cell == "single" else f"{found[name]:.0e}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


def test_the_docs_have_every_optimizer_and_its_refusals(tiny_model_dir: Path) -> None:
    rows = _documented()
    assert rows.keys() == OPTIMIZERS.keys()
    for name, cells in rows.items():
        assert [cell == "refused" for cell in cells] == [_refused(tiny_model_dir, name, cell) for cell in CELLS], name


def test_few_are_refused(tiny_model_dir: Path) -> None:
    refused = [(name, cell) for name in OPTIMIZERS for cell in CELLS if _refused(tiny_model_dir, name, cell)]
    assert len(refused) * 10 <= len(OPTIMIZERS) * len(CELLS)
    assert not {name for name, _ in refused} & set(REFUSED_NOWHERE)


def test_paged_forms_are_refused_with_lisa(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps the pages.*Set optimizer\.name=lion_8bit"):
        check_optimizer_use(config_of(tiny_model_dir, "paged_lion_8bit", LISA))


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> Callable[..., dict[str, list[float]]]:
    """Losses in one process, by settings."""
    return lru_cache(lambda settings, names: losses(0, 1, str(tiny_model_dir), settings, names))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_every_optimizer_takes_the_steps_of_one_process(
    tiny_model_dir: Path, alone: Any, request: pytest.FixtureRequest, cell: str
) -> None:
    """The processes of a strategy live for all of its column."""
    chosen = request.config.getoption("--optimizers")
    names = tuple(chosen.split(",") if chosen else OPTIMIZERS)
    works = tuple(name for name in names if not _refused(tiny_model_dir, name, cell))
    expected = alone(*((LISA, works) if cell == "lisa" else ((), names)))
    if cell == "single":
        curves = [expected]
        for name, curve in expected.items():
            assert sum(curve[-2:]) < sum(curve[:2]), f"{name} learns nothing"
    else:
        curves = []
        with ranks(2) as pool:  # for each dozen, because a call has a limit of time
            for dozen in (works[start : start + 12] for start in range(0, len(works), 12)):
                curves.append(pool.run(2, losses, str(tiny_model_dir), CELLS[cell], dozen))
        curves = [dict(item for part in own for item in part.items()) for own in zip(*curves, strict=True)]
    found = {
        name: max(
            abs(left / right - 1) for curve in curves for left, right in zip(curve[name], expected[name], strict=True)
        )
        for name in works
    }
    if request.config.getoption("--write-docs"):
        _write(cell, found)
    assert not {name: value for name, value in found.items() if not value <= TOLERANCE}
