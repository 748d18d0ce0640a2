"""The space of a sweep: what values a setting can have."""

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from raylm.config.base import Section

KINDS = ("choice", "grid", "uniform", "loguniform", "quniform", "qloguniform", "integers", "log_integers", "suggested")
"""What a dimension can be; exactly one stands in each."""
_OWN_KEYS = {*KINDS, "when", "points"}
_LOGARITHMIC = ("loguniform", "qloguniform", "log_integers")


def _takes(*names: str) -> BeforeValidator:
    """A list of so many numbers."""

    def check(value: object) -> object:
        if not isinstance(value, list | tuple) or len(value) != len(names):
            raise ValueError(f"takes [{', '.join(names)}], not {value!r}")
        return value

    return BeforeValidator(check)


def _as_values(value: object) -> object:
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"takes a list, such as [{value}]")
    return value


Range = Annotated[tuple[float, float], _takes("low", "high")]
SteppedRange = Annotated[tuple[float, float, Annotated[float, Field(gt=0)]], _takes("low", "high", "step")]
IntegerRange = Annotated[tuple[int, int], _takes("low", "high")]
Values = Annotated[tuple[Any, ...] | None, BeforeValidator(_as_values)]


def flat_overrides(value: object) -> object:
    """Sections within overrides as dotted keys; an empty mapping is a value."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, object] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found = flat_overrides(inner)
            assert isinstance(found, dict)
            flat |= {f"{key}.{name}": leaf for name, leaf in found.items()}
        else:
            flat[str(key)] = inner
    return flat


Overrides = Annotated[dict[str, Any], BeforeValidator(flat_overrides)]


class DimensionSection(Section):
    """The values of one setting: exactly one of choice, grid, uniform, loguniform, quniform, qloguniform, integers,
    log_integers, suggested."""

    choice: Values = None
    """One of these."""
    grid: Values = None
    """Each of these: trials go through all combinations of the grids in turn, whatever the search does otherwise."""
    uniform: Range | None = None
    """[low, high], each number as likely."""
    loguniform: Range | None = None
    """[low, high], each order of magnitude as likely."""
    quniform: SteppedRange | None = None
    """[low, high, step], multiples of step."""
    qloguniform: SteppedRange | None = None
    """[low, high, step], multiples of step, each order of magnitude as likely."""
    integers: IntegerRange | None = None
    """[low, high], both included."""
    log_integers: IntegerRange | None = None
    """[low, high], both included, each order of magnitude as likely."""
    suggested: Literal[True] | None = None
    """The range that the optimizer table gives for the chosen optimizer. For `optimizer.learning_rate`."""
    points: Annotated[int, Field(ge=2)] | None = None
    """Points that a grid search takes from a range, ends included."""
    when: Overrides = {}
    """Only where other settings have these values: key -> value or list of values."""

    @model_validator(mode="after")
    def exactly_one_kind_is_given(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def ranges_go_up(self) -> Self:
        if self.is_range and self.kind != "suggested":
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"{self.kind}: {low:g} is not below {high:g}. Write the lower end first")
            if self.kind in _LOGARITHMIC and low <= 0:
                raise ValueError(f"{self.kind} needs a range above 0, not from {low:g}. Raise it, or use uniform")
            if self.step is not None and self.step > high - low:
                raise ValueError(f"{self.kind}: the step {self.step:g} is larger than the range. Lower it")
        return self

    @model_validator(mode="after")
    def values_differ(self) -> Self:
        if self.values == ():
            raise ValueError(f"{self.kind} has no values. Give some, or drop the key")
        for place, value in enumerate(self.values or ()):
            if any(type(value) is type(other) and value == other for other in (self.values or ())[:place]):
                raise ValueError(f"{self.kind}: {value!r} is given twice. Drop one")
        return self

    @model_validator(mode="after")
    def points_are_of_a_range(self) -> Self:
        if self.points is not None and not self.is_range:
            raise ValueError(f"points are taken from a range; {self.kind} has its values already. Drop points")
        return self

    @property
    def kind(self) -> str:
        """The one that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of `choice` or `grid`; None for a range."""
        return self.choice if self.choice is not None else self.grid

    @property
    def is_range(self) -> bool:
        """Whether it is a range of numbers."""
        return self.values is None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of a range that stands in the file."""
        low, high = getattr(self, self.kind)[:2]
        return low, high

    @property
    def step(self) -> float | None:
        """Of what its numbers are multiples; None for any number."""
        if self.kind in ("quniform", "qloguniform"):
            return float(getattr(self, self.kind)[2])
        return 1 if self.is_integer else None

    @property
    def is_integer(self) -> bool:
        """Whether its values are whole numbers."""
        return self.kind in ("integers", "log_integers")

    @property
    def is_logarithmic(self) -> bool:
        """Whether orders of magnitude are alike."""
        return self.kind in _LOGARITHMIC


def _as_alternatives(value: object) -> object:
    if isinstance(value, dict | DimensionSection):
        return [value]
    members = [{"suggested": True} if member == "suggested" else member for member in _members(value)]
    for member in members:
        if not isinstance(member, dict | DimensionSection):
            shown = value if isinstance(value, list | tuple) else [value]
            raise ValueError(
                f"{member!r} is not a dimension. Write {{choice: {list(shown)}}}, or one of {', '.join(KINDS[1:])}"
            )
    return members


def _members(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _flat_space(value: object) -> object:
    """Sections within the space as dotted keys: `{optimizer: {learning_rate: {uniform: …}}}` is one dimension."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, object] = {}
    for key, inner in value.items():
        if inner == "suggested":
            inner = {"suggested": True}
        if isinstance(inner, dict) and _is_section(inner):
            found = _flat_space(inner)
            assert isinstance(found, dict)
            flat |= {f"{key}.{name}": dimension for name, dimension in found.items()}
        else:
            flat[str(key)] = inner
    return flat


def _is_section(value: dict[str, object]) -> bool:
    """Whether keys are of settings, not of a dimension, one of which may be misspelt."""
    if set(value) & _OWN_KEYS:
        return False
    members = [member for inner in value.values() for member in _members(inner)]
    return all(isinstance(member, dict) or member == "suggested" for member in members) or not any(
        difflib.get_close_matches(str(key), _OWN_KEYS) for key in value
    )


Alternatives = Annotated[tuple[DimensionSection, ...], Field(min_length=1), BeforeValidator(_as_alternatives)]
Space = Annotated[dict[str, Alternatives], BeforeValidator(_flat_space)]
