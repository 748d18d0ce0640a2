"""The one form in which a rendered conversation travels: text with a loss flag."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation; `loss` is True on what the assistant says and on its end token."""

    text: str
    loss: bool
