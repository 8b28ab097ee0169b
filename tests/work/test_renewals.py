"""10,000 races of renewals and expiry on a simulated clock: every interleaving of load, decide and append is possible.

What a client was promised with a 200 is kept: no expiry before that time, unless it asked for an earlier one itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from datetime import datetime, timedelta

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.decide import decide
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Sandbox, evolve
from app.errors import Rejected
from tests.support.stream import Stream, requested, seen

RACES = 10_000
DEADLINE_S = 60
Actor = Generator[None, None, None]
Decided = tuple[ev.Event, ...]


class Race:
    """A sandbox whose deadline is near, clients who renew, and timers who expire, each a step at a time."""

    def __init__(self, dice: random.Random, *, guarded: bool) -> None:
        self.dice = dice
        self.guarded = guarded
        """False = the naive store: an append does not ask whether somebody else was faster."""
        self.stream = Stream(requested(DEADLINE_S)).after(cmd.RecordSeen(seen(Power.RUNNING)))
        self.stream.pass_time(DEADLINE_S - 1.0)
        assert self.stream.sandbox.expires_at is not None
        self.promised: datetime = self.stream.sandbox.expires_at
        self.expired: list[tuple[datetime, datetime]] = []
        """(when, what had been promised then)"""
        self.refused = 0

    def execute(self, command: Callable[[], cmd.Command], done: Callable[[Decided], None]) -> Actor:
        """`Service.execute`, cut where it waits for the database."""
        while True:
            yield
            sandbox, now = self.stream.sandbox, self.stream.now
            yield
            events = self.decide(sandbox, command(), now)
            if events is None:
                self.refused += 1
                return
            if not events:
                return
            yield
            if not self.guarded or self.stream.sandbox.version == sandbox.version:
                self.append(events)
                done(events)
                return

    def decide(self, sandbox: Sandbox, command: cmd.Command, now: datetime) -> Decided | None:
        try:
            return decide(sandbox, command, now)
        except Rejected:
            return None

    def append(self, events: Decided) -> None:
        for event in events:
            self.stream.sandbox = evolve(self.stream.sandbox, self.stream._record(event))

    def client(self) -> Actor:
        for _ in range(self.dice.randint(1, 3)):
            ahead = timedelta(seconds=self.dice.uniform(0.1, 2))
            yield from self.execute(lambda ahead=ahead: cmd.Renew(self.stream.now + ahead), self.renewed)

    def renewed(self, events: Decided) -> None:
        assert isinstance(events[0], ev.Renewed)
        self.promised = events[0].expires_at

    def timer(self) -> Actor:
        while self.stream.sandbox.ending is None:
            yield from self.execute(cmd.Expire, self.ended)

    def ended(self, events: Decided) -> None:
        assert isinstance(events[0], ev.Expired)
        self.expired.append((self.stream.now, self.promised))

    def run(self) -> None:
        actors = [self.client() for _ in range(self.dice.randint(1, 2))] + [self.timer() for _ in range(2)]
        while actors:
            self.stream.pass_time(self.dice.choice((0, 0, 0.001, 0.05, 0.3)))
            actor = self.dice.choice(actors)
            try:
                next(actor)
            except StopIteration:
                actors.remove(actor)

    @property
    def broken_promise(self) -> bool:
        return any(when < promised for when, promised in self.expired)


def races(*, guarded: bool, number: int) -> list[Race]:
    dice = random.Random(316)
    ran = [Race(dice, guarded=guarded) for _ in range(number)]
    for race in ran:
        race.run()
    return ran


def test_a_renewal_that_was_accepted_is_never_followed_by_an_expiry_before_its_time():
    ran = races(guarded=True, number=RACES)
    assert not any(race.broken_promise for race in ran)
    assert all(len(race.expired) == 1 for race in ran), "it ends, and once"
    for race in ran:
        (ending,) = [fact.event for fact in race.stream.history if isinstance(fact.event, ev.Expired)]
        assert ending.expires_at == race.promised
    assert sum(race.refused > 0 for race in ran) > RACES / 10, "renewals that came too late"
    renewals = sum(any(isinstance(fact.event, ev.Renewed) for fact in race.stream.history) for race in ran)
    assert renewals > RACES / 10, "renewals that came in time"


def test_without_the_version_guard_promises_are_broken_and_ends_are_doubled():
    ran = races(guarded=False, number=RACES // 10)
    assert any(race.broken_promise for race in ran)
    assert any(len(race.expired) > 1 for race in ran)
