"""One claim, from head to goal: plan -> act through the driver -> record -> plan again.

**Protocol.** A run loads the head, then repeats: ask the core for the one next step, act, record what was observed *at
the version that was loaded*. It ends when nothing is left to do (the claim is completed) or with a wait (it is given
back). A fresh sandbox that goes well costs a share of a load, one `ensure` and one append, which ends the claim too;
the engine is not asked first, since its create meets an existing object by name.

**Nothing slow holds a claim.** An image that is missing is pulled by `app.work.fetches`; an object that is not up yet,
or not gone yet, is looked at again later. In each of these cases the claim is given back without a count, and what it
waits for wakes it, or the time does. News that came since the claim make it due at once.

**Invariants.** What was observed is recorded only if the stream has not moved since the load; else it is thrown away
and the run starts over (`StaleVersion`), because an observation from before a delete says nothing about the time after
it. Every act may be repeated from any point, here or in another process, because drivers promise that. Absence is
believed after two looks, `missing_grace` apart, that the engine answered; silence in between proves nothing. And it is
recorded, as a loss or as a removal, only after the engine has shown once more that it is the one that the log knows.

**Who did it.** Events that follow from our own act (created, started, paused on request, removed) carry the reconciler
as actor; what a plain look found changed, an exit, and a loss carry the runtime, named after the engine. A container
that had ended by the time `ensure` returned is recorded in two appends, so that each has its own actor.

**How it fails.** See `app.work.reconcile.outcomes` for trouble and for how claims end. A stream that a newer version
has written to is left alone. A database that goes away ends the run without a word, and the lease brings it back. An
error of our own outside of any step is counted in the queue and tried again, later each time: it says nothing about
the sandbox. A graceful stop cancels the run and hands the claim back; nothing counts. A lost claim ends the run
in silence, but if it may have made an object for a sandbox that has ended, it takes that away again. This is always
right, and other workers may not look there for a while.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime
from typing import NoReturn

import msgspec

from app.domain.engine.decide import NoEngine, place
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Answer, Observed, Power
from app.domain.sandbox.plan import (
    WAIT_INTERVAL,
    Absence,
    ConfirmMissing,
    Ensure,
    Fetch,
    InstallAgent,
    Lose,
    Observe,
    Place,
    Probe,
    Remove,
    SetPower,
    Settled,
    Step,
    Wait,
    plan,
)
from app.domain.sandbox.state import Desired, Phase, RuntimeState, Sandbox
from app.domain.stream import Actor
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeFault, RuntimeRejected, StoreUnavailable, UnknownEvent
from app.runtime.driver import Image
from app.runtime.faults import AgentMissing, ImageMissing
from app.service.sandboxes import Service, StaleVersion
from app.views.current import is_newer
from app.work.agents import Agents
from app.work.diagnostics import Diagnostics
from app.work.fetches import Fetches
from app.work.networks import Networks, NoAddress
from app.work.policy import WorkPolicy
from app.work.probes import Probes
from app.work.reconcile.actors import Actors
from app.work.reconcile.heads import Heads
from app.work.reconcile.leases import GivenBack, Held, LeaseLost
from app.work.reconcile.outcomes import Outcomes
from app.work.reconcile.troubles import name_of
from app.work.reconcile.workloads import Workloads, ref_of
from app.work.station import Station

_MAX_STEPS = 8
_MAX_STARTS = 5
_CLEANUP_S = 60.0
_LOG = logging.getLogger(__name__)


class NoProgress(Exception):
    """A run went round without reaching a goal: the engine says one thing and does another."""


class Reconciler:
    """Brings single sandboxes to their goals."""

    def __init__(
        self,
        *,
        service: Service,
        station: Station,
        workloads: Workloads,
        fetches: Fetches,
        agents: Agents | None,
        probes: Probes | None,
        networks: Networks,
        outcomes: Outcomes,
        diagnostics: Diagnostics,
        policy: WorkPolicy,
        actors: Actors,
    ) -> None:
        self._service = service
        self._station = station
        self._driver = station.driver
        self._workloads = workloads
        self._fetches = fetches
        self._agents = agents
        self._probes = probes
        self._networks = networks
        self._outcomes = outcomes
        self._diagnostics = diagnostics
        self._policy = policy
        self._actors = actors
        self._heads = Heads(service.view)

    async def run(self, held: Held) -> None:
        """Work on a claim to its end. Raises nothing but a cancellation."""
        try:
            await self._to_goal(held)
        except GivenBack:
            pass
        except LeaseLost:
            await self._clean_up(held)
        except asyncio.CancelledError:
            if held.lost:
                await self._clean_up(held)
            elif not held.left:
                await self._outcomes.hand_back(held)
            raise
        except StoreUnavailable as error:
            _LOG.warning("sandbox %s is left to the end of its lease: %s", held.stream_id, error)
        except UnknownEvent as error:
            await self._outcomes.leave_alone(held, error)
        except Exception as error:  # noqa: BLE001 - one sandbox's error must not end the worker
            await self._outcomes.set_aside(held, error)

    async def _to_goal(self, held: Held) -> None:
        for _ in range(_MAX_STARTS):
            try:
                await self._from_head(held)
            except StaleVersion:
                await self._outcomes.refresh(held)
            else:
                return
        await self._outcomes.give_back(held, self._policy.backoff_base)

    async def _from_head(self, held: Held) -> None:
        loaded = await self._heads.load(held.stream_id)
        if loaded is None:
            return await self._outcomes.complete(held)
        sandbox, now = loaded
        held.read_at(now)
        if is_newer(sandbox):
            raise UnknownEvent(f"sandbox {sandbox.id} was written by a newer version")
        if sandbox.phase is not Phase.PENDING:
            self._fetches.forget(sandbox.id)
        if sandbox.engine not in (None, self._station.name):
            return await self._outcomes.pass_on(held)  # another worker has placed it meanwhile
        answer: Answer | None = None
        step: Step = Observe()
        for _ in range(_MAX_STEPS):
            step = plan(sandbox, answer, self._absence(held, now))
            if isinstance(step, Settled):
                return await self._outcomes.complete(held, closed=sandbox.closed_at is not None)
            if isinstance(step, ConfirmMissing):
                return await self._outcomes.give_back_missing(held, now, step.until)
            if isinstance(step, Ensure) and self._agents is not None and not self._agents.is_installed:
                step = InstallAgent()
            try:
                sandbox, answer = await self._take(held, sandbox, step, now)
            except (StaleVersion, LeaseLost, StoreUnavailable, UnknownEvent, GivenBack):
                raise
            except Exception as error:  # noqa: BLE001 - every other failure is judged
                failed = await self._outcomes.judge(held, sandbox, step, error)
                if failed is None:
                    return None
                sandbox, answer = failed, None
        return await self._outcomes.count(held, sandbox, step, NoProgress())

    def _absence(self, held: Held, now: datetime) -> Absence:
        return Absence(now, held.claim.missing_since, self._policy.grace)

    async def _take(self, held: Held, sandbox: Sandbox, step: Step, now: datetime) -> tuple[Sandbox, Answer | None]:
        """Act, and record.

        Raises:
            GivenBack: the claim has ended.
        """
        seen: Observed | None = None
        match step:
            case Place():
                await self._place(held, sandbox)
            case Wait(waiting=waiting):
                _LOG.debug("sandbox %s waits for %s", sandbox.id, waiting.reason)
                await self._wait(held)
            case Observe():
                seen = await self._driver.observe(ref_of(sandbox))
                await self._let_settle(held, sandbox, seen, now)
                after = await self._saw(held, sandbox, seen, step, now, acted=False)
                return self._went_on(held, sandbox, after), Answer(seen)
            case InstallAgent():
                await self._install_agent(held, sandbox)
                return sandbox, None
            case Probe():
                await self._probe(held, sandbox)
            case Ensure() | Fetch():
                seen = await self._ensure(held, sandbox)
                after = await self._saw(held, sandbox, seen, step, now, acted=True)
            case SetPower(power=power):
                seen = await self._driver.set_power(ref_of(sandbox), power)
                after = await self._saw(held, sandbox, seen, step, now, acted=True)
                if seen is not None and seen.waiting is not None and seen.power is not power:
                    await self._wait(held)
            case Remove():
                after = await self._remove(held, sandbox, now)
            case Lose(missing_since=since):
                after = await self._lose(held, sandbox, since)
            case ConfirmMissing() | Settled():  # no acts
                return sandbox, None
        return self._went_on(held, sandbox, after), Answer(seen)

    async def _let_settle(self, held: Held, sandbox: Sandbox, seen: Observed | None, now: datetime) -> None:
        """A restart from outside shows an exit for a moment, and an exit that is recorded is final: look once more."""
        ended = None if seen is None or seen.power is not Power.EXITED else seen.exit
        if ended is None or ended.at is None or sandbox.observed not in (RuntimeState.RUNNING, RuntimeState.PAUSED):
            return
        age = (now - ended.at).total_seconds()
        if 0 <= age < self._policy.exit_settle:
            await self._outcomes.give_back(held, self._policy.exit_settle - age)
            raise GivenBack

    def _went_on(self, held: Held, before: Sandbox, after: Sandbox) -> Sandbox:
        if after.version != before.version:
            held.start_over()
        return after

    async def _place(self, held: Held, sandbox: Sandbox) -> NoReturn:
        """Give it to an engine, whose workers go on; ours may be among them."""
        chosen = place(await self._service.engines.known())
        if isinstance(chosen, NoEngine):
            waiting = cmd.RecordWaiting(name_of(Place()), chosen.reason, chosen.message)
            await self._outcomes.record(held, sandbox, waiting, self._worker)
            await self._outcomes.give_back(held, self._policy.place_again, awaiting=True)
            raise GivenBack
        placed = cmd.RecordPlaced(
            chosen.engine, chosen.epoch, sandbox.id, reason=chosen.reason, candidates=chosen.candidates
        )
        await self._outcomes.record(held, sandbox, placed, self._worker)
        await self._outcomes.pass_on(held)
        raise GivenBack

    async def _ensure(self, held: Held, sandbox: Sandbox) -> Observed:
        try:
            return await self._networks.ensure(sandbox, self._workloads)
        except NoAddress as error:
            await self._outcomes.await_address(held, sandbox, str(error))
        except AgentMissing:
            if self._agents is not None:
                self._agents.forget()
            raise
        except ImageMissing as missing:
            if (source := sandbox.spec.snapshot_id) is not None:
                await self._confirm_engine(held, sandbox)
                # No registry has it. The snapshot is looked at, so that the next is told before it is made.
                await self._outcomes.suspect_snapshot(source)
                gone = f"the engine does not have the image of snapshot {source} any more"
                raise RuntimeRejected("IMAGE_NOT_FOUND", gone) from missing
            await self._fetch(held, sandbox, (await self._workloads.of(sandbox)).image)
            raise GivenBack from None

    async def _install_agent(self, held: Held, sandbox: Sandbox) -> None:
        """Bring the agent's files to the engine; its image first, which is pulled while nobody holds the claim."""
        assert self._agents is not None, "the step is planned only where there is an agent"
        try:
            await self._agents.install()
        except ImageMissing:
            image = self._agents.image
            why = ("AGENT_INSTALLING", f"The image of the agent, {image.reference}, is being pulled.")
            await self._pull(held, sandbox, image, InstallAgent(), why)
            raise GivenBack from None

    async def _probe(self, held: Held, sandbox: Sandbox) -> NoReturn:
        """Have the agent asked while nobody holds the claim."""
        held.start_over()
        if self._probes is not None and await self._outcomes.give_back(held, self._policy.lease, awaiting=True):
            self._probes.want(sandbox, held.cause)
        raise GivenBack

    async def _fetch(self, held: Held, sandbox: Sandbox, image: Image) -> None:
        """Have the image pulled while nobody holds the claim."""
        await self._pull(held, sandbox, image, Fetch(), ("IMAGE_PULLING", f"Image {image.reference} is being pulled."))

    async def _pull(
        self, held: Held, sandbox: Sandbox, image: Image, step: InstallAgent | Fetch, why: tuple[str, str]
    ) -> None:
        """`why`: the reason and the message that clients see meanwhile."""
        if sandbox.phase is Phase.PENDING:
            waiting = cmd.RecordWaiting(name_of(step), *why)
            sandbox = await self._outcomes.record(held, sandbox, waiting, self._worker)
        # First the row, then the pull: a pull that ends at once must find a row that waits.
        if await self._outcomes.give_back(held, self._policy.lease, awaiting=True):
            self._fetches.want(sandbox, image, held.cause, step)

    async def _remove(self, held: Held, sandbox: Sandbox, now: datetime) -> Sandbox:
        await self._diagnostics.keep(sandbox)
        gone = await self._driver.remove(ref_of(sandbox))
        self._station.succeeded(sandbox.id)
        if not gone:
            await self._wait(held)
        await self._confirm_engine(held, sandbox)
        return await self._conclude(held, sandbox, cmd.RecordRemoved(), self._worker, now=now)

    async def _lose(self, held: Held, sandbox: Sandbox, since: datetime) -> Sandbox:
        await self._confirm_engine(held, sandbox)
        main = None if sandbox.runtime is None else sandbox.runtime.main
        removed_at = None if main is None else self._station.moments.removed_at(main.runtime_id)
        lost = cmd.RecordLost(since, occurred_at=removed_at)
        return await self._outcomes.record(held, sandbox, lost, self._actors.runtime)

    async def _wait(self, held: Held) -> NoReturn:
        held.start_over()
        await self._outcomes.give_back(held, WAIT_INTERVAL.total_seconds(), awaiting=True)
        raise GivenBack

    async def _confirm_engine(self, held: Held, sandbox: Sandbox) -> None:
        """Before absence is recorded: is this the engine that the log knows?"""
        if await self._station.confirm_identity():
            return
        _LOG.warning(
            "nothing of sandbox %s is on engine %s, but nothing is recorded, as the engine could not be confirmed: %s",
            sandbox.id,
            self._station.name,
            self._station.trouble or "it was in doubt a moment ago",
        )
        await self._outcomes.give_back(held, self._policy.missing_grace)
        raise GivenBack

    async def _saw(
        self, held: Held, sandbox: Sandbox, seen: Observed | None, step: Step, now: datetime, *, acted: bool
    ) -> Sandbox:
        self._station.succeeded(sandbox.id)
        if seen is None:
            return sandbox
        seen = self._station.annotate(seen)
        if acted:
            self._station.moments.acted(seen)
        else:
            seen = self._station.moments.annotate(seen)
        found_by = name_of(step)
        held.missing(None)
        actor = self._worker if acted else self._actors.runtime
        if acted and seen.power is Power.EXITED:
            if sandbox.observed in (RuntimeState.NONE, RuntimeState.CREATED):
                # That it was made and started is our doing; that it ended is not.
                made = msgspec.structs.replace(seen, power=Power.CREATED, exit=None, verdict=None)
                sandbox = await self._outcomes.record(held, sandbox, cmd.RecordSeen(made, found_by), actor)
            actor = self._actors.runtime
        return await self._conclude(held, sandbox, cmd.RecordSeen(seen, found_by, held.now), actor, now=now, seen=seen)

    @property
    def _worker(self) -> Actor:
        return self._actors.worker

    async def _conclude(
        self,
        held: Held,
        sandbox: Sandbox,
        observation: cmd.Observation,
        actor: Actor,
        *,
        now: datetime,
        seen: Observed | None = None,
    ) -> Sandbox:
        """Record; when nothing is left to do afterwards, the claim ends too."""

        def is_reached(after: Sandbox) -> bool:
            return isinstance(plan(after, Answer(seen), self._absence(held, now)), Settled)

        return await self._outcomes.record(held, sandbox, observation, actor, is_reached)

    async def _clean_up(self, held: Held) -> None:
        """After a lost claim: what we may have made for a sandbox that has ended has to go."""
        with suppress(StoreUnavailable, RuntimeFault, UnknownEvent, TimeoutError):
            async with asyncio.timeout(_CLEANUP_S):
                loaded = await self._service.view.load(held.stream_id, ANY_TENANT)
                if loaded is None or loaded[0].object_id is None:
                    return
                sandbox = loaded[0]
                if sandbox.desired is Desired.TERMINATED or sandbox.closed_at is not None:
                    await self._diagnostics.keep(sandbox)
                    await self._driver.remove(ref_of(sandbox))
