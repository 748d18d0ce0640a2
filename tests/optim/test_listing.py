import json
from pathlib import Path

import pytest

from raylm.cli import main
from raylm.optim.listing import markdown_lines
from raylm.optim.table import OPTIMIZERS

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
LMFLOW = (
    *("RMSprop", "LION-32bit", "Adam", "AdamP", "AdamW", "AdaFactor", "AdaBound", "AdamWScheduleFree", "Adan", "NAdam"),
    *("AdaBelief", "AdaMax", "RAdam", "AdaDelta", "AdaGrad", "Yogi", "NovoGrad", "Sophia", "LAMB", "LARS"),
    *("SGDScheduleFree", "SGDP", "SGD"),
)
"""The names of its table, in its order."""


def test_the_docs_have_the_table() -> None:
    """To renew it: python -c 'from raylm.optim.listing import markdown_lines as m; print(*m(), sep="\\n")'."""
    text = DOCS.read_text()
    assert text.partition("<!-- table -->\n")[2].partition("\n<!-- end -->")[0].splitlines() == markdown_lines()


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *OPTIMIZERS]
    assert main(["optim", "list", "--json"]) == 0
    facts = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert facts["schedulefree_sgd"]["strategies"] == ["single", "ddp", "fsdp"]
    assert facts["lion"]["strategies"] == ["single", "ddp", "fsdp", "deepspeed"]
    assert facts["lion"]["options"] == {"betas": [0.9, 0.99]}
    assert facts["came"]["state"] == "1 + 2 (rows + columns)"
    assert facts["galore"]["state"] == "2 (rank x longer side) + rank x shorter"
    assert facts["adamw_8bit"]["state"] == "2 of 8 bits"


def test_lmflows_optimizers_are_there() -> None:
    ours = {"lion-32bit": "lion", "adamwschedulefree": "schedulefree_adamw", "sgdschedulefree": "schedulefree_sgd"}
    names = {ours.get(name.lower(), name.lower()) for name in LMFLOW}
    assert names <= OPTIMIZERS.keys()
