"""APScheduler on the application's loop: the thread, the bridge, the executor.

**Threads.** APScheduler's main loop has a thread of its own, and its job stores are synchronous. `Bridge.ask` runs one
coroutine on the application's loop and waits for it, with a timeout, so all SQL stays on the application's pool.
`LoopExecutor` runs jobs as tasks of that loop. The loop itself never waits for the thread: `stop` first lets go of a
question under way, then shuts the scheduler down from another thread, because APScheduler takes a lock for that which
its thread may hold while it waits for the loop.

**How it fails.** APScheduler does not guard all calls of a store; an exception there would end its thread for good. So
`ask` never raises: it has a fallback for every question. Jobs that fail are logged, with a traceback unless the error
is one of ours, and fire again by their trigger. A job that never ends is not started again, and one slot of the
executor is gone. `alive` is false when the thread has ended or has asked nothing for a while, and when a job runs for
longer than any job may.
"""

# APScheduler 3 ships without types.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any, TypeVar

from apscheduler.executors.base import BaseExecutor
from apscheduler.job import Job
from apscheduler.jobstores.base import BaseJobStore
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from app.errors import SandledgerError

T = TypeVar("T")
ON_LOOP = "loop"
"""Name of the executor."""
_ANSWER_S = 15.0
_IDLE_S = 5.0
_PERIODIC = "periodic"
_LOG = logging.getLogger(__name__)


def interval(seconds: float, *, start: datetime | None = None, jitter: float | None = None) -> IntervalTrigger:
    """A trigger that fires every so many seconds from `start` on; `jitter` moves each time, in seconds."""
    make: Any = IntervalTrigger
    return make(seconds=seconds, start_date=start, jitter=jitter, timezone=UTC)


class Bridge:
    """From APScheduler's thread to the application's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.heard_at = time.monotonic()
        """When the thread last asked something: its sign of life."""
        self._closed = False
        self._asked: Future[Any] | None = None

    def ask(self, question: Callable[[], Coroutine[Any, Any, T]], otherwise: T) -> T:
        """Run it there, wait for the answer. Whatever goes wrong, `otherwise`: an exception would end the thread."""
        self.heard_at = time.monotonic()
        if self._closed or self._loop.is_closed():
            return otherwise
        asked = question()
        try:
            self._asked = asyncio.run_coroutine_threadsafe(asked, self._loop)
        except RuntimeError:  # the loop closed just now
            asked.close()
            return otherwise
        try:
            return self._asked.result(_ANSWER_S)
        except TimeoutError:
            self._asked.cancel()
            _LOG.warning("timers: the application's loop does not answer")
        except Exception as error:  # noqa: BLE001 - cancelled, or the database is away
            if not self._closed:
                _LOG.warning("timers: no answer this time: %s: %s", type(error).__name__, error)
        finally:
            self._asked = None
        return otherwise

    def close(self) -> None:
        """Let go of the thread, now and from now on. On the loop."""
        self._closed = True
        if (asked := self._asked) is not None:
            asked.cancel()


class LoopExecutor(BaseExecutor):
    """Runs jobs as tasks of the application's loop, a few at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, concurrency: int) -> None:
        super().__init__()
        self._loop = loop
        self._slots = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[str, float] = {}

    @property
    def longest(self) -> float:
        """For how many seconds the job that began first has been running; 0 when none runs."""
        return time.monotonic() - min(self._running.values()) if self._running else 0.0

    @property
    def waiting(self) -> int:
        """Submitted and not finished. On the loop: what the thread submitted before a question is counted there."""
        return len(self._tasks)

    def _do_submit_job(self, job: Job, run_times: Sequence[datetime]) -> None:  # noqa: ARG002
        self._loop.call_soon_threadsafe(self._begin, job)

    def _begin(self, job: Any) -> None:
        task = self._loop.create_task(self._run(job), name=f"job-{job.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Any) -> None:
        try:
            async with self._slots:
                self._running[job.id] = time.monotonic()
                await job.func(*job.args)
        except SandledgerError as error:  # of the database, say: it comes again, and its cause needs one line
            _LOG.warning("%s: no success this time: %s: %s", job.name, type(error).__name__, error)
            self._run_job_success(job.id, [])
        except Exception as error:  # noqa: BLE001 - one job's error is its own
            self._run_job_error(job.id, error, error.__traceback__)
        except BaseException:
            self._run_job_success(job.id, [])
            raise
        else:
            self._run_job_success(job.id, [])
        finally:
            self._running.pop(job.id, None)

    async def drain(self, grace: float) -> None:
        """Let what was submitted finish, then cancel it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in (left := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class Timers:
    """The scheduler of one worker."""

    def __init__(self, concurrency: int, *, stuck_after: float = 600) -> None:
        """Inside a running loop. A job that runs for `stuck_after` seconds counts as stuck."""
        self._stuck_after = stuck_after
        loop = asyncio.get_running_loop()
        self.bridge = Bridge(loop)
        self.executor = LoopExecutor(loop, concurrency)
        self._scheduler: Any = BackgroundScheduler(
            jobstores={_PERIODIC: MemoryJobStore()}, executors={ON_LOOP: self.executor}, timezone=UTC, daemon=True
        )

    def add_store(self, name: str, store: BaseJobStore) -> None:
        """Jobs kept elsewhere. Before `start`."""
        self._scheduler.add_jobstore(store, name)

    def every(self, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
        """Run it now, and then every so often, give or take a tenth. Before `start`."""
        self._scheduler.add_job(
            work,
            trigger=interval(seconds, jitter=seconds / 10),
            next_run_time=datetime.now(UTC),
            jobstore=_PERIODIC,
            executor=ON_LOOP,
            misfire_grace_time=None,
            coalesce=True,
            max_instances=1,
        )

    def start(self) -> None:
        """Start the scheduler's thread. Once."""
        self._scheduler.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is there and has asked for work lately, and no job is stuck."""
        thread = self._scheduler._thread  # noqa: SLF001 - it has no public name
        heard = time.monotonic() - self.bridge.heard_at < 2 * _ANSWER_S + _IDLE_S
        return thread is not None and thread.is_alive() and heard and self.executor.longest < self._stuck_after

    async def stop(self, grace: float) -> None:
        """Nothing more is begun; running jobs may finish."""
        self.bridge.close()
        await asyncio.to_thread(self._scheduler.shutdown, wait=False)
        await self.executor.drain(grace)
