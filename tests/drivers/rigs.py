"""The engines of the conformance cases: the fake, and a real Docker engine behind a proxy."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import aiodocker
import msgspec

from app.cli.local_image import _find_busybox, ensure_local_image, entry, regular_file, tar
from app.domain.sandbox.address import own_network
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect, names
from app.runtime.driver import Driver, Exit, Leftover, Limits, Ref, Workload
from app.runtime.fake import FakeDriver, FakeEngine, FakeVolume, Pull, agent_name
from app.runtime.faults import AttemptFailed
from app.settings import DockerSettings
from tests.agent.image import BOOTSTRAP, SLEEPER, ensure_tiny_agent_image
from tests.drivers.proxy import EngineProxy, Gate, Refusal
from tests.drivers.registry import Registry, serve
from tests.drivers.rig import BUSYBOX, SlowAgent, SlowImage, workload
from tests.support.marks import remove_mark


def shellless() -> bytes:
    """A root file system with a static busybox, and no shell by that name."""
    return tar([entry("bin", tarfile.DIRTYPE, 0o755), regular_file("bin/busybox", _find_busybox().read_bytes(), 0o755)])


class FakeRig:
    all_gpus: int | None = 4

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.engine.gpus = self.all_gpus
        self.calls = self.engine.calls
        self._installation = uuid4()
        self._gates: dict[str, Gate] = {}
        self._lost: Counter[str] = Counter()
        self._refused: set[str] = set()
        self.driver: Driver = self.another()

    def another(self) -> Driver:
        return FakeDriver(self.engine, self._installation, before=self._before, after=self._after)

    def networked(self) -> Driver:
        return FakeDriver(
            self.engine, self._installation, before=self._before, after=self._after, subnet="10.99.0.0/24"
        )

    async def forget_network(self) -> None:
        self.engine.networks.clear()

    def elsewhere(self) -> Driver:
        return FakeDriver(self.engine, uuid4())

    def work(self, **changes: Any) -> Workload:
        return workload(**changes)

    def ending(self, code: int) -> Workload:
        work = self.work()
        self.engine.scripts[work.ref.object_id] = Exit(code)
        return work

    def talking(self, *lines: str) -> Workload:
        work = self.work(env={"SAID": "s3cr3t-value"})
        self.engine.write(work.ref.object_id, *lines)
        return work

    def greedy(self) -> Workload:
        return self.work()

    async def starve(self, object_id: UUID) -> None:
        self.engine.exit(object_id, oom=True)

    async def missing_image(self) -> str:
        return "missing/image:1"

    async def image_to_pull(self) -> str:
        reference = f"elsewhere/{uuid4().hex}:1"
        self.engine.to_pull.add(reference)
        return reference

    async def slow_image(self) -> SlowImage:
        reference, gate = await self.image_to_pull(), asyncio.Event()
        self.engine.pulls[reference] = Pull(("0 of 1 layers", "0 of 1 layers, 0.5 of 1.0 MB"), gate=gate)
        before = self.engine.calls["pull"]

        async def reached() -> None:
            while self.engine.calls["pull"] == before:
                await asyncio.sleep(0)

        return SlowImage(reference, reached, gate)

    async def agent_image(self) -> str:
        return f"agent/{uuid4().hex}:1"

    async def slow_agent(self) -> SlowAgent:
        reference, gate = await self.agent_image(), asyncio.Event()
        image = self.engine.image(reference)
        assert image is not None
        name = self.agent_name(image.image_id)
        self.engine.fill_gates[name] = gate

        async def reached() -> None:
            while name not in self.engine.fills or self.engine.fills[name].done():
                await asyncio.sleep(0)

        async def finish() -> None:
            gate.set()

        async def kill() -> None:
            self.engine.end(self.engine.containers[name], Exit(137))
            gate.set()

        return SlowAgent(reference, reached, finish, kill)

    async def shellless_image(self) -> str:
        return "noshell/image:1"

    async def bare_image(self) -> str:
        return f"bare/{uuid4().hex}:1"

    def agent_name(self, image_id: str) -> str:
        return agent_name(self._installation, image_id)

    async def agent_works(self, volume: str) -> bool:
        return self.engine.volumes[volume].filled

    async def forget_agent(self, volume: str) -> None:
        self.engine.destroy(volume)
        del self.engine.volumes[volume]

    async def strange_volume(self, name: str) -> None:
        self.engine.volumes[name] = FakeVolume()

    def take_ports(self, starts: int) -> None:
        self.engine.starts_without_port = starts

    async def stranger(self, name: str) -> None:
        self.engine.make(name)

    async def exists(self, name: str) -> bool:
        return name in self.engine.containers

    async def kill(self, object_id: UUID) -> None:
        self.engine.exit(object_id, 137)

    async def end_by_id(self, ref: Ref) -> None:
        found = self.engine.with_id(ref.runtime_id)
        assert found is not None
        self.engine.end(found, Exit(137))

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

    def decline(self, call: str) -> None:
        reason = {"pause": "PAUSE_REFUSED", "unpause": "RESUME_REFUSED", "remove": "REMOVE_REFUSED"}.get(call)
        reason = reason or {"pull": "IMAGE_PULL_FAILED"}.get(call, "START_FAILED")
        self.engine.refusals[call] = AttemptFailed(reason, "refused by the test")

    def relent(self) -> None:
        self._refused.clear()
        self.engine.refusals.clear()

    async def leftover(self, installation: UUID | None = None) -> UUID:
        object_id = uuid4()
        part = Leftover("egress", f"sandbox-egress-{object_id}", uuid4().hex, object_id, position=7)
        self.engine.leave(installation or self._installation, part)
        return object_id

    async def forget_mark(self) -> None:
        self.engine.marks.clear()

    async def rename(self, object_id: UUID, name: str) -> None:
        self.engine.rename(object_id, name)

    async def restart(self, object_id: UUID) -> None:
        self.engine.restart(object_id)

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

    all_gpus: int | None = None

    def __init__(self, engine: str) -> None:
        self.proxy = EngineProxy(engine)
        self.calls = self.proxy.calls
        self.direct = aiodocker.Docker(engine)
        self._installations = [uuid4()]
        self._drivers: list[DockerDriver] = []
        self._strangers: list[str] = []
        self._strange_volumes: list[str] = []
        self._stack = AsyncExitStack()
        self._registry: Registry | None = None
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

    def networked(self) -> Driver:
        subnets = DockerSettings().subnets
        return self.with_options(msgspec.structs.replace(self.options, network_mode="bridge", subnets=subnets))

    async def forget_network(self) -> None:
        await (await self.direct.networks.get(own_network(self._installations[0]))).delete()

    def with_options(self, options: DockerOptions) -> DockerDriver:
        self._drivers.append(connect(options, self.proxy.address))
        return self._drivers[-1]

    def work(self, **changes: Any) -> Workload:
        return workload(**changes)

    def ending(self, code: int) -> Workload:
        return self.work(entrypoint=("sh", "-c", f"exit {code}"))

    def talking(self, *lines: str) -> Workload:
        script = ("sh", "-c", 'for line in "$@"; do echo "$line"; done; exec sleep 3600', "sh", *lines)
        return self.work(entrypoint=script, env={"SAID": "s3cr3t-value"})

    def greedy(self) -> Workload:
        script = ("sh", "-c", "mkfifo /tmp/go; read line < /tmp/go; exec tail /dev/zero")
        return self.work(entrypoint=script, limits=Limits(memory_bytes=8 << 20))

    async def starve(self, object_id: UUID) -> None:
        # Early or late, the line gets there: before the mkfifo it makes a plain file, which is read as well.
        container = self.direct.containers.container(f"sandbox-{object_id}")
        go = await container.exec(["sh", "-c", "echo go > /tmp/go"])
        await go.start(detach=True)

    async def missing_image(self) -> str:
        return (await self.registry()).reference(f"nobody-{uuid4().hex}/has-this")

    async def registry(self) -> Registry:
        """A registry of this rig, begun at the first question."""
        if self._registry is None:
            self._registry = await self._stack.enter_async_context(serve())
        return self._registry

    async def image_to_pull(self) -> str:
        return (await self.registry()).add(name=f"tiny-{uuid4().hex}")

    async def slow_image(self) -> SlowImage:
        registry = await self.registry()
        registry.blob_gate = asyncio.Event()
        registry.blob_started.clear()
        return SlowImage(await self.image_to_pull(), registry.blob_started.wait, registry.blob_gate)

    async def agent_image(self) -> str:
        return await ensure_tiny_agent_image(self.direct)

    async def slow_agent(self) -> SlowAgent:
        reference = await ensure_tiny_agent_image(self.direct, blocks=True)
        helper = self.agent_name((await self.direct.images.inspect(reference))["Id"])
        container = self.direct.containers.container

        async def reached() -> None:
            while (shown := await self.inspect(helper)) is None or not shown["State"]["Running"]:
                await asyncio.sleep(0.02)

        async def finish() -> None:
            go = await container(helper).exec(["sh", "-c", "echo '#!/bin/sh' > /execd"])
            await go.start(detach=True)

        async def kill() -> None:
            await container(helper).kill()

        return SlowAgent(reference, reached, finish, kill)

    async def shellless_image(self) -> str:
        return await ensure_local_image(self.direct, "sandledger-noshell:1", lambda: [shellless()])

    async def bare_image(self) -> str:
        return BUSYBOX

    def agent_name(self, image_id: str) -> str:
        return names.agent_name(self._installations[0], image_id)

    async def agent_works(self, volume: str) -> bool:
        """Reads the volume through the helper, which runs no more."""
        archive = await self.direct.containers.container(volume).get_archive("/t")
        found = {file.name.partition("/")[2]: file for file in archive.getmembers() if file.isfile()}
        read = {name: (archive.extractfile(file) or io.BytesIO()).read() for name, file in found.items()}
        read["prepare.sh"] = b"" if read.get("prepare.sh") else b"missing"
        files = {"execd": SLEEPER, "bootstrap.sh": BOOTSTRAP, "prepare.sh": b""}
        return read == files and {each.mode & 0o7777 for each in found.values()} == {0o755}

    async def forget_agent(self, volume: str) -> None:
        await self.direct.containers.container(volume).delete()
        await (await self.direct.volumes.get(volume)).delete()

    async def strange_volume(self, name: str) -> None:
        await self.direct.volumes.create({"Name": name})
        self._strange_volumes.append(name)

    def take_ports(self, starts: int) -> None:
        self.proxy.scarce["start"] = starts

    async def stranger(self, name: str, labels: dict[str, str] | None = None) -> None:
        labels = {names.INSTALLATION: str(uuid4())} if labels is None else labels
        config = {"Image": BUSYBOX, "Entrypoint": ["sleep", "3600"], "Labels": labels}
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

    async def kill(self, object_id: UUID) -> None:
        await self.direct.containers.container(f"sandbox-{object_id}").kill()

    async def end_by_id(self, ref: Ref) -> None:
        assert ref.runtime_id is not None
        await self.direct.containers.container(ref.runtime_id).kill()

    def hold(self, call: str) -> Gate:
        return self.proxy.gates.setdefault(call, Gate())

    def lose_reply(self, call: str) -> None:
        self.proxy.lost[call] += 1

    def refuse(self, call: str) -> None:
        self.proxy.refusals[call] = Refusal(503)

    def decline(self, call: str) -> None:
        self.proxy.refusals[call] = Refusal(500)

    def relent(self) -> None:
        self.proxy.refusals.clear()

    async def leftover(self, installation: UUID | None = None) -> UUID:
        object_id = uuid4()
        labels = names.labels_of(
            installation or self._installations[0], object_id, names.EGRESS, tenant="t", generation=1, position=7
        )
        await self.stranger(names.container_name(object_id, names.EGRESS), labels)
        return object_id

    async def forget_mark(self) -> None:
        volume = await self.direct.volumes.get(names.mark_name(self._installations[0]))
        await volume.delete()

    async def rename(self, object_id: UUID, name: str) -> None:
        await self.direct.containers.container(names.container_name(object_id)).rename(name)

    async def restart(self, object_id: UUID) -> None:
        await self.direct.containers.container(names.container_name(object_id)).restart(t=0)

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
        await self.clear()
        for name in self._strangers:
            if await self.exists(name):
                await self.direct.containers.container(name).delete(force=True, v=True)
        for installation in self._installations:
            await remove_mark(self.direct, installation)
        await self._forget_volumes()
        await self._forget_snapshots()
        await self._forget_images()
        await self._stack.aclose()
        await self.direct.close()

    async def clear(self) -> None:
        """Remove the containers of this rig."""
        for installation in self._installations:
            filters = msgspec.json.encode({"label": [f"{names.INSTALLATION}={installation}"]}).decode()
            for container in await self.direct.containers.list(all="1", filters=filters):
                await container.delete(force=True, v=True)

    async def volumes(self) -> list[str]:
        """Those of this rig's installations."""
        ours = {str(installation) for installation in self._installations}
        rows = (await self.direct.volumes.list())["Volumes"] or ()
        return [row["Name"] for row in rows if (row["Labels"] or {}).get(names.INSTALLATION) in ours]

    async def _forget_volumes(self) -> None:
        for name in [*await self.volumes(), *self._strange_volumes]:
            await (await self.direct.volumes.get(name)).delete()

    async def _forget_snapshots(self) -> None:
        ours = {str(installation) for installation in self._installations}
        for row in await self.direct.images.list():
            if (row["Labels"] or {}).get(names.INSTALLATION) in ours:
                await self.direct.images.delete(row["Id"], force=True)

    async def _forget_images(self) -> None:
        if self._registry is None:
            return
        for row in await self.direct.images.list():
            # By id too: an image whose tag moved has no name any more.
            known = (row["RepoTags"] or []) + (row["RepoDigests"] or [])
            if row["Id"] in self._registry.image_ids or any(name.startswith(self._registry.prefix) for name in known):
                await self.direct.images.delete(row["Id"], force=True)
