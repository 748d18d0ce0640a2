"""The one form in which a rendered conversation travels: text with flags."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    loss: the assistant says it, or it is the end token of an answer. generated: in serving the model writes it,
    although no loss is asked for it by itself: the space that a header ends with and that a prompt leaves out.
    literal: somebody typed the name of a control token; it stays text. turn: the message that an answer belongs to.
    """

    text: str
    loss: bool
    generated: bool = False
    literal: bool = False
    turn: int = -1
