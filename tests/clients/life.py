"""The life of a sandbox in the public Python SDK, in three acts. What is between them is up to the test."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.execd import RunCommandOpts
from opensandbox.models.filesystem import (
    ContentReplaceEntry,
    DirectoryListEntry,
    MoveEntry,
    SearchEntry,
    SetPermissionEntry,
    WriteEntry,
)
from opensandbox.models.sandboxes import SandboxFilter, SnapshotFilter

from app.agent import AGENT_PORT
from tests.clients.kinds import Kind, pieces

RESOURCE = {"cpu": "250m", "memory": "128Mi"}
PATIENCE_SECONDS = 45.0


def texts(messages: list[Any]) -> list[str]:
    return [each.text for each in messages]


async def until(ask: Any, what: str) -> None:
    """Poll the SDK until it says so."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await ask():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited in vain: {what}") from None


class Life:
    """One sandbox from create to kill."""

    def __init__(self, kind: Kind, image: str, config: dict[str, Any]) -> None:
        """`config` are the keywords of the connection."""
        self.kind, self.image, self._config = kind, image, config
        self.tag = f"{kind.name}-{config.get('use_server_proxy', False)}".lower()
        self.sandbox: Any = None

    def config(self) -> Any:
        """A connection of its own. A sandbox closes the one that it was made with."""
        return self.kind.config(**self._config)

    async def first_act(self) -> None:
        """Create, read, run commands."""
        self.sandbox = await self.kind.sandbox.create(
            self.image,
            timeout=timedelta(minutes=10),
            entrypoint=["sleep", "3600"],
            env={"COLOUR": "red"},
            metadata={"life": self.tag},
            resource=RESOURCE,
            connection_config=self.config(),
        )
        info = await self.sandbox.get_info()
        assert (info.status.state, info.metadata, info.entrypoint) == (
            "Running",
            {"life": self.tag},
            ["sleep", "3600"],
        )
        assert abs(info.expires_at - info.created_at - timedelta(minutes=10)) < timedelta(seconds=2)
        assert await self.sandbox.is_healthy()
        await self._commands()
        await self._in_the_background()
        await self._sessions()

    async def _commands(self) -> None:
        commands = self.sandbox.commands
        heard: list[str] = []
        done = await commands.run(
            'echo one; echo "$COLOUR $SIZE"; pwd; echo three >&2; exit 7',
            opts=RunCommandOpts(working_directory="/tmp", envs={"SIZE": "big"}),
            handlers=self.kind.handlers(
                on_init=self.kind.handler(lambda event: heard.append(event.id)),
                on_stdout=self.kind.handler(lambda event: heard.append(event.text)),
                on_stderr=self.kind.handler(lambda event: heard.append(f"! {event.text}")),
                on_error=self.kind.handler(lambda event: heard.append(event.value)),
            ),
        )
        assert (texts(done.logs.stdout), texts(done.logs.stderr)) == (["one", "red big", "/tmp"], ["three"])
        assert (done.exit_code, done.id) == (7, heard[0])
        assert sorted(heard[1:]) == sorted(["one", "red big", "/tmp", "! three", "7"])
        assert texts((await commands.run(["echo", "$COLOUR two"])).logs.stdout) == ["$COLOUR two"]
        await commands.set_env("KEPT", "it's kept")
        assert texts((await commands.run('echo "$KEPT"')).logs.stdout) == ["it's kept"]
        assert len((await commands.run("seq 2000")).logs.stdout) == 2000

    async def _in_the_background(self) -> None:
        commands = self.sandbox.commands
        started = await commands.run("echo begun; sleep 3600", opts=RunCommandOpts(background=True))

        async def begun() -> bool:
            return "begun" in (await commands.get_background_command_logs(started.id)).content

        await until(begun, "the command in the background has written")
        assert (await commands.get_command_status(started.id)).running
        logs = await commands.get_background_command_logs(started.id)
        assert (await commands.get_background_command_logs(started.id, logs.cursor)).content == ""
        await commands.interrupt(started.id)

        async def ended() -> bool:
            return not (await commands.get_command_status(started.id)).running

        await until(ended, "the interrupted command has ended")
        assert (await commands.get_command_status(started.id)).exit_code != 0
        with pytest.raises(SandboxApiException) as caught:
            await commands.get_command_status("absent")
        assert caught.value.status_code == 404

    async def _sessions(self) -> None:
        commands = self.sandbox.commands
        session = await commands.create_session(working_directory="/tmp")
        await commands.run_in_session(session, "export IN_SESSION=yes; cd /")
        kept = await commands.run_in_session(session, 'echo "$IN_SESSION"; pwd')
        assert texts(kept.logs.stdout) == ["yes", "/"]
        await commands.delete_session(session)

    async def second_act(self) -> None:
        """Files, metrics, endpoints, on the sandbox that the first act left."""
        await self._files()
        measured = await self.sandbox.get_metrics()
        assert measured.cpu_count > 0
        assert measured.memory_total_in_mib > measured.memory_used_in_mib > 0
        await self._endpoints()

    async def _files(self) -> None:
        files, folder = self.sandbox.files, "/tmp/work"
        content = bytes(range(256)) * 4096
        await files.create_directories([WriteEntry(path=folder, mode=750)])
        await files.write_files(
            [
                WriteEntry(path=f"{folder}/a b+c%2F.bin", data=content, mode=640),
                WriteEntry(path=f"{folder}/ü.txt", data="one\ntwo\nthree\n"),
            ]
        )
        await files.write_file(f"{folder}/sub/note", "alpha alpha")
        assert await files.read_bytes(f"{folder}/a b+c%2F.bin") == content
        downloaded = [piece async for piece in pieces(await files.read_bytes_stream(f"{folder}/a b+c%2F.bin"))]
        assert b"".join(downloaded) == content
        assert await files.read_bytes(f"{folder}/a b+c%2F.bin", range_header="bytes=256-511") == content[:256]
        assert await files.read_file(f"{folder}/ü.txt", offset=2, limit=1) == "two\n"
        (counted,) = await files.replace_contents_detailed(
            [ContentReplaceEntry(path=f"{folder}/sub/note", old_content="alpha", new_content="beta")]
        )
        assert counted.replaced_count == 2
        await files.replace_contents(
            [ContentReplaceEntry(path=f"{folder}/sub/note", old_content="beta ", new_content="")]
        )
        await files.move_files([MoveEntry(source=f"{folder}/sub/note", destination=f"{folder}/moved")])
        assert await files.read_file(f"{folder}/moved") == "beta"
        await files.set_permissions([SetPermissionEntry(path=f"{folder}/moved", mode=600)])
        info = (await files.get_file_info([f"{folder}/moved"]))[f"{folder}/moved"]
        assert (info.mode, info.size, info.entry_type) == (600, 4, "file")
        found = await files.search(SearchEntry(path=folder, pattern="*.txt"))
        assert [each.path for each in found] == [f"{folder}/ü.txt"]
        listed = await files.list_directory(DirectoryListEntry(path=folder, depth=2))
        assert {each.path.removeprefix(f"{folder}/") for each in listed} == {"a b+c%2F.bin", "moved", "sub", "ü.txt"}
        await files.delete_files([f"{folder}/moved"])
        await files.delete_directories([folder])
        with pytest.raises(SandboxApiException) as caught:
            await files.get_file_info([folder])
        assert caught.value.status_code == 404

    async def _endpoints(self) -> None:
        """A program of the user, reached where the SDK says."""
        await self.sandbox.files.write_file("/srv/page", f"page of {self.tag}")
        await self.sandbox.commands.run("httpd -p 3000 -h /srv")
        found = await self.sandbox.get_endpoint(3000)
        headers = found.build_request_headers(self.config())

        async def answers() -> bool:
            async with httpx.AsyncClient() as http:
                answer = await http.get(f"http://{found.endpoint}/page", headers=headers)
                return answer.status_code == 200 and answer.text == f"page of {self.tag}"

        await until(answers, f"{found.endpoint} serves the page")
        assert (await self.sandbox.get_endpoint(AGENT_PORT)).headers
        with pytest.raises(SandboxApiException) as caught:
            await self.sandbox.get_signed_endpoint(3000, 2_000_000_000)
        assert caught.value.status_code == 400

    async def snapshots(self) -> None:
        """Copy the files, and go on with a sandbox of the copy."""
        await self.sandbox.files.write_file("/kept", self.tag)
        manager = await self.kind.manager.create(self.config())
        try:
            made = await manager.create_snapshot(self.sandbox.id, name=f"of-{self.tag}")
            assert (made.sandbox_id, made.name) == (self.sandbox.id, f"of-{self.tag}")

            async def ready() -> bool:
                state = (await manager.get_snapshot(made.id)).status.state
                assert state in ("Creating", "Ready"), state
                return state == "Ready"

            await until(ready, "the snapshot is ready")
            page = await manager.list_snapshots(SnapshotFilter(sandbox_id=self.sandbox.id, states=["Ready"]))
            assert [each.id for each in page.snapshot_infos] == [made.id]
            copy = await self.kind.sandbox.create(
                snapshot_id=made.id, entrypoint=["sleep", "3600"], resource=RESOURCE, connection_config=self.config()
            )
            assert await copy.files.read_file("/kept") == self.tag
            with pytest.raises(SandboxApiException) as caught:
                await manager.delete_snapshot(made.id)
            assert (caught.value.status_code, caught.value.error.code) == (409, "SNAPSHOT::DELETE_CONFLICT")
            await copy.destroy()

            async def deleted() -> bool:
                try:
                    await manager.delete_snapshot(made.id)
                except SandboxApiException as error:
                    return error.status_code == 404
                return False

            await until(deleted, "the copy is gone, and the snapshot after it")
        finally:
            await manager.close()

    async def _diagnosed(self, manager: Any) -> None:
        logs = await manager.get_diagnostic_logs(self.sandbox.id, "container")
        assert (logs.kind, logs.scope, logs.delivery) == ("logs", "container", "inline")
        events = await manager.get_diagnostic_events(self.sandbox.id, "runtime")
        assert "requested" in events.content

    async def third_act(self) -> None:
        """Renew, patch, pause, resume, connect, kill."""
        renewed = await self.sandbox.renew(timedelta(hours=2))
        assert abs(renewed.expires_at - datetime.now(UTC) - timedelta(hours=2)) < timedelta(minutes=1)
        patched = await self.sandbox.patch_metadata({"life": None, "kept": self.tag})
        assert patched.metadata == {"kept": self.tag}
        await self.sandbox.pause()

        async def paused() -> bool:
            return (await self.sandbox.get_info()).status.state == "Paused"

        await until(paused, "the sandbox is paused")
        await self.sandbox.close()
        self.sandbox = await self.kind.sandbox.resume(self.sandbox.id, connection_config=self.config())
        assert texts((await self.sandbox.commands.run("echo awake")).logs.stdout) == ["awake"]
        again = await self.kind.sandbox.connect(self.sandbox.id, connection_config=self.config())
        assert texts((await again.commands.run('echo "$KEPT"')).logs.stdout) == ["it's kept"]
        await again.check_ready(timedelta(seconds=20), timedelta(milliseconds=100))
        await self._managed()
        await again.close()
        await self.sandbox.destroy()
        with pytest.raises(SandboxApiException) as caught:
            await self.kind.sandbox.connect(self.sandbox.id, connection_config=self.config())
        assert (caught.value.status_code, caught.value.error.code) == (404, "DOCKER::SANDBOX_NOT_FOUND")

    async def _managed(self) -> None:
        """The same sandbox through the manager."""
        manager = await self.kind.manager.create(self.config())
        try:
            page = await manager.list_sandbox_infos(SandboxFilter(states=["Running"], metadata={"kept": self.tag}))
            assert [each.id for each in page.sandbox_infos] == [self.sandbox.id]
            assert page.pagination.total_items == 1
            assert (await manager.get_sandbox_info(self.sandbox.id)).status.state == "Running"
            await self._diagnosed(manager)
            await manager.renew_sandbox(self.sandbox.id, timedelta(hours=1))
            await manager.patch_sandbox_metadata(self.sandbox.id, {"more": "x"})
            await manager.pause_sandbox(self.sandbox.id)

            async def paused() -> bool:
                return (await manager.get_sandbox_info(self.sandbox.id)).status.state == "Paused"

            await until(paused, "the sandbox is paused by the manager")
            await manager.resume_sandbox(self.sandbox.id)

            async def runs() -> bool:
                return (await manager.get_sandbox_info(self.sandbox.id)).status.state == "Running"

            await until(runs, "the sandbox runs again")
        finally:
            await manager.close()
