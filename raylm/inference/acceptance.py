"""What became of guessed tokens: vLLM's counters of speculation, as differences and as rates."""

from dataclasses import dataclass
from typing import Any, Self

_DRAFTS = "vllm:spec_decode_num_drafts"
_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts over a span of time. drafts: steps of a request in which tokens were guessed; draft_tokens: those guessed;
    accepted_tokens: those the model agreed with; per_position: accepted at each place ahead."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    per_position: tuple[int, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """From the text of /metrics, or of prometheus_client's `generate_latest`, over all engines together."""
        from prometheus_client.parser import text_string_to_metric_families

        totals: dict[str, int] = {}
        places: dict[int, int] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{_PER_POSITION}_total":
                    place = int(sample.labels["position"])
                    places[place] = places.get(place, 0) + int(sample.value)
                elif sample.name.endswith("_total"):
                    name = sample.name.removesuffix("_total")
                    totals[name] = totals.get(name, 0) + int(sample.value)
        return cls(
            drafts=totals.get(_DRAFTS, 0),
            draft_tokens=totals.get(_DRAFT_TOKENS, 0),
            accepted_tokens=totals.get(_ACCEPTED, 0),
            per_position=tuple(places[place] for place in sorted(places)),
        )

    def since(self, before: "Acceptance") -> "Acceptance":
        """What was counted after `before`."""
        earlier = before.per_position or (0,) * len(self.per_position)
        return Acceptance(
            drafts=self.drafts - before.drafts,
            draft_tokens=self.draft_tokens - before.draft_tokens,
            accepted_tokens=self.accepted_tokens - before.accepted_tokens,
            per_position=tuple(now - then for now, then in zip(self.per_position, earlier, strict=True)),
        )

    @property
    def rate(self) -> float | None:
        """Share of the guessed tokens that was accepted; None when none was guessed."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def mean_length(self) -> float | None:
        """Tokens that a step with guesses gave: those accepted, and the one that the model adds."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def rate_per_position(self) -> tuple[float, ...]:
        """Share of the drafts in which each place was accepted, the nearest first."""
        return tuple(count / self.drafts for count in self.per_position) if self.drafts else ()

    def as_json(self) -> dict[str, Any]:
        """The rates, rounded, for reports."""
        return {
            "acceptance_rate": None if self.rate is None else round(self.rate, 4),
            "mean_accepted_length": None if self.mean_length is None else round(self.mean_length, 3),
            "acceptance_per_position": [round(rate, 4) for rate in self.rate_per_position],
        }
