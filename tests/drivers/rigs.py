"""What a conformance case needs of an engine, for the fake and for Docker: workloads, trouble, and a look behind."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol
from uuid import UUID, uuid4

import aiodocker
import msgspec

from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.runtime.docker.spec import LABEL_INSTALLATION
from app.runtime.driver import Driver, Exit, Limits, Workload
from app.runtime.fake import FakeDriver, FakeEngine
from tests.drivers.proxy import EngineProxy, Gate

BUSYBOX = "sandledger-demo:1"


class Rig(Protocol):
    driver: Driver
    calls: Counter[str]

    def another(self) -> Driver:
        """A second server of the same installation."""
        ...

    def elsewhere(self) -> Driver:
        """A server of another installation on the same engine."""
        ...

    def work(self, **changes: Any) -> Workload:
        """A workload that runs until it is removed."""
        ...

    def ending(self, code: int) -> Workload:
        """A workload that ends by itself."""
        ...

    def greedy(self) -> Workload:
        """A workload that `starve` lets run into its memory limit."""
        ...

    async def starve(self, sandbox_id: UUID) -> None:
        """Not from its start on: the engine begins to watch only then, and may miss it."""
        ...

    def missing_image(self) -> str: ...
    def image_to_pull(self) -> str:
        """An image that is not on the engine."""
        ...

    async def stranger(self, name: str) -> None:
        """A container that is not ours."""
        ...

    async def exists(self, name: str) -> bool: ...
    async def kill(self, sandbox_id: UUID) -> None:
        """End the workload from outside."""
        ...

    def hold(self, call: str) -> Gate: ...
    def lose_reply(self, call: str) -> None:
        """Once: the engine acts, nobody hears of it."""
        ...

    def refuse(self, call: str) -> None:
        """From now on the engine answers this call with its own trouble."""
        ...

    async def down(self) -> None: ...
    async def up(self) -> None: ...
    def listening(self) -> bool:
        """An event stream is open."""
        ...

    def drop_streams(self) -> None: ...
    async def close(self) -> None: ...


def workload(**changes: Any) -> Workload:
    plain = Workload(uuid4(), "default", BUSYBOX, ("sleep", "3600"), {})
    return msgspec.structs.replace(plain, **changes)


class FakeRig:
    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.calls = self.engine.calls
        self._installation = uuid4()
        self._gates: dict[str, Gate] = {}
        self._lost: Counter[str] = Counter()
        self._refused: set[str] = set()
        self.driver: Driver = self.another()

    def another(self) -> Driver:
        return FakeDriver(self.engine, self._installation, before=self._before, after=self._after)

    def elsewhere(self) -> Driver:
        return FakeDriver(self.engine, uuid4())

    def work(self, **changes: Any) -> Workload:
        return workload(**changes)

    def ending(self, code: int) -> Workload:
        work = self.work()
        self.engine.scripts[work.sandbox_id] = Exit(code)
        return work

    def greedy(self) -> Workload:
        return self.work()

    async def starve(self, sandbox_id: UUID) -> None:
        self.engine.exit(sandbox_id, oom=True)

    def missing_image(self) -> str:
        return "missing/image:1"

    def image_to_pull(self) -> str:
        self.engine.to_pull.add("elsewhere/image:1")
        return "elsewhere/image:1"

    async def stranger(self, name: str) -> None:
        self.engine.make(name)

    async def exists(self, name: str) -> bool:
        return name in self.engine.containers

    async def kill(self, sandbox_id: UUID) -> None:
        self.engine.exit(sandbox_id, 137)

    def hold(self, call: str) -> Gate:
        return self._gates.setdefault(call, Gate())

    def lose_reply(self, call: str) -> None:
        self._lost[call] += 1

    def refuse(self, call: str) -> None:
        self._refused.add(call)

    async def down(self) -> None:
        self.engine.down = True
        self.engine.drop_streams()

    async def up(self) -> None:
        self.engine.down = False

    def listening(self) -> bool:
        return self.engine.listeners > 0

    def drop_streams(self) -> None:
        self.engine.drop_streams()

    async def close(self) -> None:
        await self.driver.close()

    async def _before(self, call: str) -> None:
        if gate := self._gates.get(call):
            await gate.pass_through()
        if call in self._refused:
            raise RuntimeUnavailable("refused by the test")

    async def _after(self, call: str) -> None:
        if self._lost[call]:
            self._lost[call] -= 1
            raise RuntimeUnavailable("the reply got lost")


class DockerRig:
    """A real engine behind a proxy, and a client of its own to look past it."""

    def __init__(self, engine: str) -> None:
        self.proxy = EngineProxy(engine)
        self.calls = self.proxy.calls
        self.direct = aiodocker.Docker(engine)
        self._installations = [uuid4()]
        self._drivers: list[DockerDriver] = []
        self._strangers: list[str] = []
        self.registries: list[str] = []
        """Images pulled from these go when the containers have gone."""
        self.driver: Driver = self.another()

    @classmethod
    async def start(cls, engine: str) -> DockerRig:
        rig = cls(engine)
        await rig.proxy.up()
        return rig

    @property
    def options(self) -> DockerOptions:
        return DockerOptions(installation=self._installations[0], api_timeout=60.0)

    def another(self) -> DockerDriver:
        return self.with_options(self.options)

    def elsewhere(self) -> Driver:
        self._installations.append(uuid4())
        return self.with_options(msgspec.structs.replace(self.options, installation=self._installations[-1]))

    def with_options(self, options: DockerOptions) -> DockerDriver:
        self._drivers.append(connect(options, self.proxy.address))
        return self._drivers[-1]

    def work(self, **changes: Any) -> Workload:
        return workload(**changes)

    def ending(self, code: int) -> Workload:
        return self.work(entrypoint=("sh", "-c", f"exit {code}"))

    def greedy(self) -> Workload:
        script = ("sh", "-c", "mkfifo /tmp/go; read line < /tmp/go; exec tail /dev/zero")
        return self.work(entrypoint=script, limits=Limits(memory_bytes=8 << 20))

    async def starve(self, sandbox_id: UUID) -> None:
        # Early or late, the line gets there: before the mkfifo it makes a plain file, which is read as well.
        container = self.direct.containers.container(f"sandbox-{sandbox_id}")
        go = await container.exec(["sh", "-c", "echo go > /tmp/go"])
        await go.start(detach=True)

    def missing_image(self) -> str:
        return "sha256:" + "0" * 64

    def image_to_pull(self) -> str:
        return "127.0.0.1:1/elsewhere/image:1"

    async def stranger(self, name: str) -> None:
        config = {"Image": BUSYBOX, "Entrypoint": ["sleep", "3600"], "Labels": {LABEL_INSTALLATION: str(uuid4())}}
        await self.direct.containers.create(config, name=name)
        self._strangers.append(name)

    async def exists(self, name: str) -> bool:
        return await self.inspect(name) is not None

    async def inspect(self, name: str) -> dict[str, Any] | None:
        try:
            return await self.direct.containers.container(name).show()
        except aiodocker.DockerError as error:
            if error.status != 404:
                raise
            return None

    async def kill(self, sandbox_id: UUID) -> None:
        await self.direct.containers.container(f"sandbox-{sandbox_id}").kill()

    def hold(self, call: str) -> Gate:
        return self.proxy.gates.setdefault(call, Gate())

    def lose_reply(self, call: str) -> None:
        self.proxy.lost[call] += 1

    def refuse(self, call: str) -> None:
        self.proxy.refusals[call] = 503

    async def down(self) -> None:
        await self.proxy.down()

    async def up(self) -> None:
        await self.proxy.up()

    def listening(self) -> bool:
        return bool(self.proxy.streams)

    def drop_streams(self) -> None:
        self.proxy.drop_streams()

    async def close(self) -> None:
        for driver in self._drivers:
            await driver.close()
        await self.proxy.close()
        for installation in self._installations:
            filters = msgspec.json.encode({"label": [f"{LABEL_INSTALLATION}={installation}"]}).decode()
            for container in await self.direct.containers.list(all="1", filters=filters):
                await container.delete(force=True, v=True)
        for name in self._strangers:
            await self.direct.containers.container(name).delete(force=True, v=True)
        await self._forget_images()
        await self.direct.close()

    async def _forget_images(self) -> None:
        for row in await self.direct.images.list() if self.registries else ():
            names = (row["RepoTags"] or []) + (row["RepoDigests"] or [])
            if any(name.startswith(registry) for name in names for registry in self.registries):
                await self.direct.images.delete(row["Id"], force=True)
