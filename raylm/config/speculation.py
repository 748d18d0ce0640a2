"""Speculative decoding: the methods, one row each, and the `speculation` section of servers and offline generation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Section
from raylm.errors import nearest

MAX_SPECULATIVE_TOKENS = 128
"""What vLLM's rejection sampler takes."""
OFF_ABOVE_ON_CPU = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationRow:
    """What raylm has to know about a method of vLLM.

    drafter: what `speculation.model` names: `model` a whole model, `head` a folder made for one target, `target` the
    target itself (nothing is named), None where text alone is drafted from. lookup: it takes prompt_lookup_min and
    prompt_lookup_max. num_speculative_tokens: drafted when the section names no number. on_cpu: vLLM's CPU engine runs
    it. pauses: it can draft no tokens in some steps, which `off_above` asks for. package: that it needs.
    """

    summary: str
    source: str
    drafter: Literal["model", "head", "target"] | None = None
    lookup: bool = False
    num_speculative_tokens: int
    on_cpu: bool = True
    pauses: bool = True
    package: str | None = None


SPECULATION_METHODS: Mapping[str, SpeculationRow] = {
    "ngram": SpeculationRow(
        summary="copies what followed the same words earlier in the request",
        source="arXiv:2304.04487; vLLM's prompt lookup",
        lookup=True,
        num_speculative_tokens=6,
    ),
    "ngram_gpu": SpeculationRow(
        summary="the same, searched on the GPU",
        source="vLLM",
        lookup=True,
        num_speculative_tokens=6,
        on_cpu=False,
    ),
    "suffix": SpeculationRow(
        summary="copies what followed the same words in this request and in earlier ones",
        source="arXiv:2411.04975",
        num_speculative_tokens=16,
        pauses=False,
        package="arctic_inference",
    ),
    "draft_model": SpeculationRow(
        summary="a small model with the target's vocabulary proposes (raylm distill-draft makes one)",
        source="arXiv:2211.17192",
        drafter="model",
        num_speculative_tokens=4,
    ),
    "eagle": SpeculationRow(
        summary="a head over the target's last hidden states proposes",
        source="arXiv:2401.15077",
        drafter="head",
        num_speculative_tokens=3,
    ),
    "eagle3": SpeculationRow(
        summary="a head over hidden states of three of the target's layers proposes",
        source="arXiv:2503.01840",
        drafter="head",
        num_speculative_tokens=3,
    ),
    "medusa": SpeculationRow(
        summary="one head for each position ahead proposes",
        source="arXiv:2401.10774",
        drafter="head",
        num_speculative_tokens=3,
        pauses=False,
    ),
    "mtp": SpeculationRow(
        summary="the layers for multi-token prediction that the target was trained with propose",
        source="arXiv:2412.19437",
        drafter="target",
        num_speculative_tokens=1,
    ),
}


class SpeculationSection(Section):
    """Speculative decoding: tokens are guessed cheaply, and the model checks several at once.

    Which tokens are answered, and with what probability, stays what the model alone would do.
    """

    method: str
    """`ngram`, `draft_model`, `eagle`, `eagle3`, `medusa`, `mtp`, `suffix` or `ngram_gpu`."""
    model: Annotated[str, Field(min_length=1)] | None = None
    """Draft model or head: hub id, folder, GGUF file or `pkg://PACKAGE/FILE`."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_SPECULATIVE_TOKENS)] | None = None
    """Tokens guessed at a time; default: by method, 6 for `ngram` and 4 for `draft_model`."""
    prompt_lookup_min: Annotated[int, Field(ge=1)] | None = None
    """`ngram`: fewest tokens that must match; default: 2, or prompt_lookup_max if that is less."""
    prompt_lookup_max: Annotated[int, Field(ge=1)] | None = None
    """`ngram`: most tokens that are looked for; default: 4, or prompt_lookup_min if that is more."""
    off_above: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Nothing is guessed while more requests than this run; null never stops. `auto` is 8 on a CPU, which has no
    arithmetic to spare above, and never on a GPU. `raylm speculate bench` measures from where it loses."""

    @field_validator("method")
    @classmethod
    def method_is_a_row_of_the_table(cls, method: str) -> str:
        if method not in SPECULATION_METHODS:
            raise ValueError(f"{method} is not a method. {nearest(method, SPECULATION_METHODS).rstrip('?.')}")
        return method

    @model_validator(mode="after")
    def model_goes_with_a_method_that_drafts_by_one(self) -> Self:
        needed = self.row.drafter in ("model", "head")
        if needed and self.model is None:
            raise ValueError(f"method={self.method} needs model. Set speculation.model to its folder or hub id")
        if not needed and self.model is not None:
            others = ", ".join(name for name, row in SPECULATION_METHODS.items() if row.drafter in ("model", "head"))
            raise ValueError(f"method={self.method} excludes model. Drop speculation.model, or choose one of {others}")
        return self

    @model_validator(mode="after")
    def prompt_lookup_goes_with_ngram(self) -> Self:
        given = [key for key in ("prompt_lookup_min", "prompt_lookup_max") if getattr(self, key) is not None]
        if given and not self.row.lookup:
            raise ValueError(f"{given[0]} excludes method={self.method}. Drop it, or set speculation.method=ngram")
        if len(given) == 2 and self.prompt_lookup_min > self.prompt_lookup_max:  # type: ignore[operator]
            raise ValueError(
                f"prompt_lookup_min={self.prompt_lookup_min} is above prompt_lookup_max={self.prompt_lookup_max}"
            )
        return self

    @model_validator(mode="after")
    def off_above_goes_with_a_method_that_pauses(self) -> Self:
        if isinstance(self.off_above, int) and not self.row.pauses:
            raise ValueError(f"off_above excludes method={self.method}, which always guesses the same number. Drop it")
        return self

    @property
    def row(self) -> SpeculationRow:
        """What there is to know about `method`."""
        return SPECULATION_METHODS[self.method]

    @property
    def num_tokens(self) -> int:
        """Tokens guessed at a time."""
        return self.num_speculative_tokens or self.row.num_speculative_tokens

    def limit(self, *, use_gpu: bool) -> int | None:
        """`off_above` with `auto` resolved; None where guessing never stops."""
        if self.off_above != "auto":
            return self.off_above
        return OFF_ABOVE_ON_CPU if self.row.pauses and not use_gpu else None

    def engine_settings(self, draft: str | None = None, *, use_gpu: bool) -> dict[str, Any]:
        """vLLM's `speculative_config`. draft: hub id or folder of the draft model, where there is one."""
        settings: dict[str, Any] = {"method": self.method, "num_speculative_tokens": self.num_tokens}
        if draft is not None:
            settings["model"] = draft
        if self.row.lookup:
            low, high = self.prompt_lookup_min, self.prompt_lookup_max
            settings["prompt_lookup_min"] = low or min(2, high or 2)
            settings["prompt_lookup_max"] = high or max(4, low or 4)
        limit = self.limit(use_gpu=use_gpu)
        if limit is not None:
            # Inclusive ranges of running requests, each with its number of tokens; the last one goes on for ever.
            settings["num_speculative_tokens_per_batch_size"] = [
                [1, limit, self.num_tokens],
                [limit + 1, limit + 1, 0],
            ]
        return settings
