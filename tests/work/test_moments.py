"""When the engine said that something was done to an object from outside, and that only a time that is right is kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Observed, Part
from app.domain.sandbox.state import Phase
from app.runtime.driver import Change, Hint, Power
from app.runtime.fake import FakeEngine
from app.runtime.fake import name_of as container_of
from app.runtime.fake.engine import News
from app.work.moments import MAX_PARTS, Moments
from tests.work.stage import QUICK, Stage

OBJECT = uuid4()
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def hint(change: Change, at: datetime | None = NOON, runtime_id: str = "r1") -> Hint:
    return Hint(OBJECT, runtime_id, change, at)


def shown(power: Power, runtime_id: str = "r1") -> Observed:
    return Observed(OBJECT, (Part("main", runtime_id, "sandbox-1"),), power)


def heard(*hints: Hint) -> Moments:
    moments = Moments()
    for each in hints:
        moments.note(each)
    return moments


def since(moments: Moments, power: Power) -> datetime | None:
    return moments.annotate(shown(power)).power_since


# What is kept


def test_the_last_hint_explains_the_power_that_it_leads_to():
    paused = heard(hint(Change.PAUSED))
    assert (since(paused, Power.PAUSED), since(paused, Power.RUNNING), since(paused, Power.EXITED)) == (
        NOON,
        None,
        None,
    )
    paused.note(hint(Change.RESUMED, NOON + SECOND))
    assert (since(paused, Power.PAUSED), since(paused, Power.RUNNING)) == (None, NOON + SECOND)
    assert paused.annotate(shown(Power.RUNNING, "r2")).power_since is None, "it is about another part of that name"
    assert paused.annotate(Observed(OBJECT, (), Power.RUNNING)).power_since is None


def test_whatever_else_happens_ends_the_explanation():
    assert since(heard(hint(Change.PAUSED), hint(Change.OTHER, NOON + SECOND)), Power.PAUSED) is None
    assert since(heard(hint(Change.PAUSED, None)), Power.PAUSED) is None, "the engine did not say when"


def test_a_hint_that_comes_again_out_of_turn_changes_nothing():
    """A stream that begins anew may repeat what was heard."""
    moments = heard(hint(Change.PAUSED), hint(Change.RESUMED, NOON + SECOND), hint(Change.PAUSED))
    assert (since(moments, Power.PAUSED), since(moments, Power.RUNNING)) == (None, NOON + SECOND)


def test_after_a_broken_stream_only_removals_are_known():
    moments = heard(hint(Change.PAUSED), hint(Change.REMOVED, NOON, "r2"))
    moments.missed()
    assert since(moments, Power.PAUSED) is None, "it may have been resumed and paused again"
    assert moments.removed_at("r2") == NOON, "that happens once"
    assert moments.removed_at("r1") is None


def test_what_this_worker_does_itself_ends_the_explanation():
    moments = heard(hint(Change.PAUSED))
    moments.acted(shown(Power.RUNNING))
    assert since(moments, Power.PAUSED) is None


def test_the_oldest_are_forgotten_first():
    moments = heard(*(hint(Change.REMOVED, NOON, str(number)) for number in range(MAX_PARTS + 1)))
    assert (moments.removed_at("0"), moments.removed_at("1")) == (None, NOON)


# What the log says


class Witness:
    """The engine's own word about what happened."""

    def __init__(self, engine: FakeEngine) -> None:
        self._stream = engine.open_stream()
        self._heard: list[News] = []

    def times(self, change: Change) -> list[datetime]:
        while not self._stream.empty():
            news = self._stream.get_nowait()
            assert news is not None
            self._heard.append(news)
        return [news.at for news in self._heard if news.change is change]


async def occurred(stage: Stage, sandbox_id: UUID, kind: type[ev.Paused | ev.Resumed]) -> list[datetime | None]:
    """`occurred_at` of these events, in order."""
    return [one.event.occurred_at for one in await stage.history(sandbox_id) if isinstance(one.event, kind)]


async def test_a_pause_and_a_resume_from_outside_have_the_engines_time_and_ours_have_none(stage: Stage, until):
    witness = Witness(stage.engine)
    async with stage.working(stage.worker()):
        sandbox_id = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())

        stage.engine.set_power(container_of(sandbox_id), Power.PAUSED)
        await until(stage.is_told(sandbox_id, "resumed"))  # by us: nobody had asked for a pause
        await until(stage.is_idle())
        [paused_at] = witness.times(Change.PAUSED)
        assert await occurred(stage, sandbox_id, ev.Paused) == [paused_at]
        assert await occurred(stage, sandbox_id, ev.Resumed) == [None]

        await stage.ask(sandbox_id, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, sandbox_id))
        await until(stage.is_idle())
        stage.engine.set_power(container_of(sandbox_id), Power.RUNNING)

        async def put_right() -> bool:
            return len(await occurred(stage, sandbox_id, ev.Paused)) == 3

        await until(put_right)
        _, resumed_at = witness.times(Change.RESUMED)
        assert await occurred(stage, sandbox_id, ev.Paused) == [paused_at, None, None]
        assert await occurred(stage, sandbox_id, ev.Resumed) == [None, resumed_at]


async def test_a_loss_has_the_time_of_the_removal(stage: Stage, until):
    """It is believed only after a second look; the time of the first hint is kept until then."""
    witness = Witness(stage.engine)
    async with stage.working(stage.worker()):
        sandbox_id = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())
        stage.engine.destroy(container_of(sandbox_id))
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
    [removed_at] = witness.times(Change.REMOVED)
    last = (await stage.history(sandbox_id))[-1]
    assert isinstance(last.event, ev.RuntimeLost)
    assert last.event.occurred_at == removed_at
    assert last.event.missing_since is not None
    assert last.event.missing_since >= removed_at, "fake and database share one clock"
    assert last.at >= last.event.missing_since + timedelta(seconds=QUICK.missing_grace)


async def test_a_loss_that_the_engine_did_not_tell_has_no_time(stage: Stage):
    """A sweep found it, or the worker was restarted meanwhile."""
    worker = stage.worker(missing_grace=0)
    sandbox_id = await stage.running(worker)
    stage.engine.destroy(container_of(sandbox_id))
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    last = (await stage.history(sandbox_id))[-1].event
    assert isinstance(last, ev.RuntimeLost)
    assert last.occurred_at is None
