"""Run a section to its end even when the caller is cancelled.

Protocol: the section runs as a task of its own. A cancellation of the caller is remembered, the section's end is
awaited, and only then does the cancellation go on its way. The section's result or error is lost with it, which is
right for sections that can be repeated.

How it fails: when the loop itself ends (`asyncio.run` cancels every task), the section is cut like anything else;
that is a crash, and repeating the section has to cope with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_completion(section: Coroutine[Any, Any, T]) -> T:
    """Await `section`; a cancellation that arrives meanwhile is raised after its end."""
    task = asyncio.create_task(section)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # wait() neither cancels the task nor raises its error, so whatever is caught here is the caller's own.
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # marks the error as seen, or the loop would report it as forgotten
        raise cancelled
    return task.result()
