"""The training methods, one row each. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """What the rest of raylm has to know about a method.

    section: the section with its settings. adapter: it trains low-rank adapters, which are saved as a folder of their
    own. merges: what it trained is added into the base's weights for the export. quantized: the frozen weights are NF4,
    and what it trained is merged into the weights that they were made of. freezes: parameters can be taken out of what
    it trains. excluded: strategies it does not run on, with the reason.
    """

    section: str | None = None
    adapter: bool = False
    merges: bool = False
    quantized: bool = False
    freezes: bool = False
    excluded: Mapping[str, str] = field(default_factory=dict)


METHODS = {
    "full": MethodRow(freezes=True),
    "lora": MethodRow(section="lora", adapter=True, merges=True),
    "qlora": MethodRow(
        section="lora",
        adapter=True,
        merges=True,
        quantized=True,
        excluded={"deepspeed": "ZeRO cuts and gathers floating-point weights, which 4-bit ones are not"},
    ),
    "lisa": MethodRow(section="lisa", freezes=True),
    "new_rows": MethodRow(merges=True),
}
STRATEGIES = ("single", "ddp", "fsdp", "deepspeed")
