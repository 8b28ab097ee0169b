"""Work that several callers share: one flight for a key, however many callers ask.

Protocol. The first caller for a key starts the flight, later ones join it. Each gets reports of its progress;
who joins late gets the latest one at once. The result is a value for all: where it may be a failure, let it be a value
too, so that each caller raises an error of its own.

Invariants. A caller that is cancelled leaves alone. The flight lives until the last caller has left; then it is
cancelled and forgotten at once, so that no caller can join a flight that ends. The key is kept only as long as its
flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeAlias, TypeVar

from app.runtime.driver import Progress

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Begin: TypeAlias = Callable[[Progress], Coroutine[Any, Any, T]]


class Flight(Generic[T]):
    """One piece of work under way."""

    def __init__(self, begin: Begin[T]) -> None:
        self.passengers: dict[object, Progress] = {}
        self._latest: str | None = None
        self.task = asyncio.create_task(begin(self._report))

    def board(self, progress: Progress) -> object:
        """Join; the answer is the ticket to leave with."""
        ticket = object()
        self.passengers[ticket] = progress
        if self._latest is not None:
            progress(self._latest)
        return ticket

    def _report(self, text: str) -> None:
        self._latest = text
        for progress in tuple(self.passengers.values()):
            progress(text)


class Flights(Generic[K, T]):
    """The flights of one kind."""

    def __init__(self) -> None:
        self._flights: dict[K, Flight[T]] = {}

    async def join(self, key: K, begin: Begin[T], progress: Progress) -> T:
        """The result of the flight for `key`, begun if there is none."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(begin)
        ticket = flight.board(progress)
        try:
            # The shield keeps one caller's cancellation from the others.
            return await asyncio.shield(flight.task)
        finally:
            del flight.passengers[ticket]
            if not flight.passengers:
                # No await between the check and the removal, so no caller joins in between.
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()  # nothing when it is done

    async def close(self) -> None:
        """Cancel the flights that still run."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
