"""How the settings of the next trial are chosen. Each is a function of the seed, the trial's number and what other
trials have reported: there is no state to save, and a resumed sweep goes on as if nothing had happened."""

import random
from collections.abc import Callable
from typing import Protocol

from raylm.tuning.candidates import Candidates
from raylm.tuning.journal import SweepState
from raylm.tuning.space import Settings, draw, fixed_grids


class Search(Protocol):
    """Chooses settings."""

    def suggest(self, number: int, state: SweepState) -> Settings | None:
        """Settings of trial `number`, or None when there are no more. state: all trials with smaller numbers."""
        ...

    @property
    def size(self) -> int | None:
        """Trials there are; None for no end."""
        ...


class GridSearch:
    """All combinations, in order; later keys of the space vary fastest. In an order of chance, which the seed decides,
    for a scheduler that compares a trial with those before it: one along a growing value, where each is better than the
    last, would never stop any."""

    def __init__(self, candidates: Candidates) -> None:
        self._points = candidates.points()
        if candidates.config.scheduler.name != "none":
            generator(candidates.config.seed, 0, "grid").shuffle(self._points)

    def suggest(self, number: int, state: SweepState) -> Settings | None:
        """See Search."""
        return self._points[number] if number < len(self._points) else None

    @property
    def size(self) -> int | None:
        """See Search."""
        return len(self._points)


class RandomSearch:
    """Each trial from the seed and its number."""

    def __init__(self, candidates: Candidates) -> None:
        self._space, self._base = candidates.config.space, candidates.base_settings
        self._seed = candidates.config.seed
        self._grids = fixed_grids(self._space, self._base)

    def suggest(self, number: int, state: SweepState) -> Settings | None:
        """See Search."""
        return draw(self._space, self._base, generator(self._seed, number), self._grids[number % len(self._grids)])

    @property
    def size(self) -> int | None:
        """See Search."""
        return None


def generator(seed: int, number: int, purpose: str = "search") -> random.Random:
    """A generator of its own for each trial and purpose."""
    return random.Random(f"{seed}:{purpose}:{number}")


def make_search(candidates: Candidates) -> Search:
    """The search of a sweep. Raises ConfigError for what it cannot search."""
    from raylm.tuning.tpe import OptunaSearch

    searches: dict[str, Callable[[Candidates], Search]] = {
        "grid": GridSearch,
        "random": RandomSearch,
        "optuna": OptunaSearch,
    }
    return searches[candidates.config.search.name](candidates)
