"""Checks of what the optimizers here are given; torch's own make the same."""

from collections.abc import Collection, Sequence


def check_betas(betas: Sequence[float]) -> None:
    """Raises ValueError unless they are two numbers from 0 to below 1."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, not {list(betas)}")


def check_counts(**counts: float) -> None:
    """Raises ValueError for one that is no whole number from 1."""
    for name, count in counts.items():
        if count < 1 or count != int(count):
            raise ValueError(f"{name} must be a whole number from 1, not {count!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError for a value that is no choice."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")
