"""Counts and lists as people read them."""

from collections.abc import Sequence

_MOST_NAMES = 20


def listed(names: Sequence[str]) -> str:
    """`a, b, c`; of many the first, `and 5 more`."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def counted(number: float, noun: str) -> str:
    """`1 trial`, `2 trials`, `1,156 tokens`, `0.5 GPUs`."""
    amount = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{amount} {noun}{'' if number == 1 else 's' if noun[-1:] != 'h' else 'es'}"
