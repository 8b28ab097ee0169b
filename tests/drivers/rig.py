"""What a conformance case needs of an engine: workloads, trouble, and a look behind. `rigs` has one for each engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from uuid import UUID, uuid4

import msgspec

from app.runtime.driver import Driver, Image, Ref, Workload
from tests.drivers.proxy import Gate

BUSYBOX = "sandledger-demo:1"


class Rig(Protocol):
    driver: Driver
    calls: Counter[str]
    all_gpus: int | None
    """How many "all" GPUs are; None = this engine does not say."""

    def another(self) -> Driver:
        """A second server of the same installation."""
        ...

    def elsewhere(self) -> Driver:
        """A server of another installation on the same engine."""
        ...

    def networked(self) -> Driver:
        """A server of the same installation whose sandboxes stand on our own network."""
        ...

    async def forget_network(self) -> None:
        """Somebody removes our network."""
        ...

    def work(self, **changes: Any) -> Workload:
        """A workload that runs until it is removed."""
        ...

    def ending(self, code: int) -> Workload:
        """A workload that ends by itself."""
        ...

    def talking(self, *lines: str) -> Workload:
        """A workload that writes these lines and runs on."""
        ...

    def greedy(self) -> Workload:
        """A workload that `starve` lets run into its memory limit."""
        ...

    async def starve(self, object_id: UUID) -> None:
        """Not from its start on: the engine begins to watch only then, and may miss it."""
        ...

    async def missing_image(self) -> str:
        """A reference that no registry knows."""
        ...

    async def image_to_pull(self) -> str:
        """An image that is not on the engine, and that a registry has."""
        ...

    async def slow_image(self) -> SlowImage:
        """The same, and its pull stops half way."""
        ...

    async def agent_image(self) -> str:
        """An image that holds an agent, on the engine."""
        ...

    async def slow_agent(self) -> SlowAgent:
        """The same, and the copy of its files stops half way."""
        ...

    async def shellless_image(self) -> str:
        """An image without a shell, on the engine."""
        ...

    async def bare_image(self) -> str:
        """An image on the engine that holds none."""
        ...

    def agent_name(self, image_id: str) -> str:
        """Of the volume with its files, and of the helper that copies them."""
        ...

    async def agent_works(self, volume: str) -> bool:
        """All its files are in the volume, whole."""
        ...

    async def forget_agent(self, volume: str) -> None:
        """Somebody removes the volume and the helper."""
        ...

    async def strange_volume(self, name: str) -> None:
        """A volume that is not ours."""
        ...

    def take_ports(self, starts: int) -> None:
        """So many starts find the port taken that they were to publish."""
        ...

    async def stranger(self, name: str) -> None:
        """A container that is not ours."""
        ...

    async def exists(self, name: str) -> bool: ...
    async def kill(self, object_id: UUID) -> None:
        """End the workload from outside."""
        ...

    async def end_by_id(self, ref: Ref) -> None:
        """The same where the object has another name."""
        ...

    def hold(self, call: str) -> Gate: ...
    def lose_reply(self, call: str) -> None:
        """Once: the engine acts, nobody hears of it."""
        ...

    def refuse(self, call: str) -> None:
        """From now on the engine answers this call with its own trouble."""
        ...

    def decline(self, call: str) -> None:
        """From now on a healthy engine answers that it did not do it."""
        ...

    def relent(self) -> None:
        """It does what it is asked for again."""
        ...

    async def leftover(self, installation: UUID | None = None) -> UUID:
        """A part of an object without its `main`, ours unless `installation` says otherwise; its object id."""
        ...

    async def forget_mark(self) -> None:
        """Somebody removes our mark, or it is another engine."""
        ...

    async def rename(self, object_id: UUID, name: str) -> None:
        """A person gives the object's container another name."""
        ...

    async def restart(self, object_id: UUID) -> None:
        """Stop and start the same object from outside."""
        ...

    async def down(self) -> None: ...
    async def up(self) -> None: ...
    def listening(self) -> bool:
        """An event stream is open."""
        ...

    def drop_streams(self) -> None: ...
    async def close(self) -> None: ...


def workload(*, image: str = BUSYBOX, platform: str | None = None, auth: Any = None, **changes: Any) -> Workload:
    plain = Workload(Ref(uuid4()), "default", Image(image, platform, auth), ("sleep", "3600"), {})
    return msgspec.structs.replace(plain, **changes)


class SlowImage:
    """An image whose pull stops half way until `open`."""

    def __init__(self, reference: str, reached: Callable[[], Awaitable[object]], gate: asyncio.Event) -> None:
        self.reference = reference
        self.reached = reached
        self.gate = gate


class SlowAgent:
    """An agent image whose copy stops half way, until `finish`. `kill` ends the helper there."""

    def __init__(
        self,
        reference: str,
        reached: Callable[[], Awaitable[object]],
        finish: Callable[[], Awaitable[object]],
        kill: Callable[[], Awaitable[object]],
    ) -> None:
        self.reference = reference
        self.reached = reached
        self.finish = finish
        self.kill = kill
