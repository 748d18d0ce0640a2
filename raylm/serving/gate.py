"""At most so many requests at once, so many more in a queue, first come first served."""

import asyncio
import math
from collections import deque


class Gate:
    """Places for requests on one event loop. Who has entered must leave; who waits may give up."""

    def __init__(self, max_concurrent: int, max_queue: int) -> None:
        self._max_concurrent, self._max_queue = max_concurrent, max_queue
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.running = 0
        self._mean_s = 1.0  # of the latest stays, for the advice to clients that are sent away

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enter(self) -> bool:
        """Takes a place if one is free; nobody waits then."""
        if self.running >= self._max_concurrent:
            return False
        self.running += 1
        return True

    def queue(self) -> asyncio.Future[None] | None:
        """A place in the queue: the future is done when its holder has entered. None when the queue is full."""
        if len(self._waiting) >= self._max_queue:
            return None
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        return place

    def give_up(self, place: asyncio.Future[None]) -> None:
        """For a holder that does not want to enter any more; whether it has entered already does not matter."""
        if place.done():
            self._free()
        else:
            self._waiting.remove(place)
            place.cancel()

    def leave(self, stayed_s: float) -> None:
        """Frees the place of a request that has entered."""
        self._mean_s += (stayed_s - self._mean_s) / 16
        self._free()

    def retry_after_s(self) -> int:
        """Whole seconds until the queue has likely moved on by one place, at least 1."""
        return max(1, math.ceil(self._mean_s / self._max_concurrent))

    def _free(self) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(None)  # the place goes on to the first in the queue
        else:
            self.running -= 1
