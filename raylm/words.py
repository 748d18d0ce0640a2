"""Counts as people read them."""


def counted(number: float, noun: str) -> str:
    """`1 trial`, `2 trials`, `1,156 tokens`, `0.5 GPUs`."""
    amount = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{amount} {noun}{'' if number == 1 else 's' if noun[-1:] != 'h' else 'es'}"
