"""What our server and the public SDK count on in an agent. The stand-in is held to the real one by these checks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from opensandbox.adapters.command_adapter import CommandsAdapter
from opensandbox.adapters.health_adapter import HealthAdapter
from opensandbox.adapters.metrics_adapter import MetricsAdapter
from opensandbox.config import ConnectionConfig
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.execd import Execution, RunCommandOpts
from opensandbox.models.sandboxes import SandboxEndpoint

from app.agent import TOKEN_HEADER
from tests.agent.conftest import TOKEN, Eventually, Sandbox
from tests.agent.image import STANDIN

pytestmark = pytest.mark.engine
PATHS = ("/ping", "/metrics", "/files/info?path=/etc/passwd", "/command/status/x", "/proxy/3000/", "/nothing")


def lines(execution: Execution) -> tuple[list[str], list[str]]:
    logs = execution.logs
    return [each.text for each in logs.stdout], [each.text for each in logs.stderr]


# token


@pytest.mark.parametrize("token", [None, "another", ""])
@pytest.mark.parametrize("path", PATHS)
async def test_no_path_without_the_token(
    session: aiohttp.ClientSession, sandbox: Sandbox, path: str, token: str | None
):
    headers = {} if token is None else {TOKEN_HEADER: token}
    async with (
        aiohttp.ClientSession(headers=headers) as stranger,
        stranger.get(f"http://{sandbox.agent}{path}") as answer,
    ):
        assert answer.status == 401


async def test_ping(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    assert await HealthAdapter(*endpoint).ping("any")


# commands


async def test_a_command_with_output(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    execution = await CommandsAdapter(*endpoint).run("echo one; echo two; echo three >&2")
    assert lines(execution) == (["one", "two"], ["three"])
    assert (execution.exit_code, execution.error) == (0, None)
    assert execution.id
    assert execution.complete is not None


async def test_a_command_that_fails(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    execution = await CommandsAdapter(*endpoint).run("exit 3")
    assert execution.exit_code == 3
    assert execution.error is not None


async def test_a_command_with_options(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    opts = RunCommandOpts(working_directory="/tmp", envs={"WHO": "me"})
    execution = await CommandsAdapter(*endpoint).run("pwd; echo $WHO", opts=opts)
    assert lines(execution)[0] == ["/tmp", "me"]


async def test_arguments_without_a_shell(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    execution = await CommandsAdapter(*endpoint).run(["echo", "$HOME two"])
    assert lines(execution)[0] == ["$HOME two"]


async def test_an_environment_that_stays(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    commands = CommandsAdapter(*endpoint)
    await commands.set_env("STAYS", "with a space")
    assert lines(await commands.run("echo $STAYS"))[0] == ["with a space"]


async def test_a_command_in_the_background(endpoint: tuple[ConnectionConfig, SandboxEndpoint], eventually: Eventually):
    commands = CommandsAdapter(*endpoint)
    execution = await commands.run("echo begun; exit 4", opts=RunCommandOpts(background=True))
    assert execution.id is not None

    async def ended() -> bool:
        return not (await commands.get_command_status(execution.id or "")).running

    await eventually(ended)
    assert (await commands.get_command_status(execution.id)).exit_code == 4
    assert "begun" in (await commands.get_background_command_logs(execution.id)).content


async def test_an_interrupt(endpoint: tuple[ConnectionConfig, SandboxEndpoint], eventually: Eventually):
    commands = CommandsAdapter(*endpoint)
    execution = await commands.run("sleep 3600", opts=RunCommandOpts(background=True))
    assert (await commands.get_command_status(execution.id or "")).running
    await commands.interrupt(execution.id or "")

    async def ended() -> bool:
        return not (await commands.get_command_status(execution.id or "")).running

    assert await eventually(ended)


async def test_a_child_that_stays_does_not_hold_up_the_answer(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    async with asyncio.timeout(20):
        execution = await CommandsAdapter(*endpoint).run("sleep 3600 & echo begun")
    assert (lines(execution)[0], execution.exit_code) == (["begun"], 0)


def test_a_client_that_reads_slowly_gets_all_of_the_output():
    """The command has ended long before: its output waits in the pipe. Half a second of reading on gave 500 lines."""
    program = """
import sys, time
from commands import Command
heard = []
def slowly(**event):
    time.sleep(0.001)
    heard.append(event["type"])
Command(["seq", "2000"], {}).run(slowly)
print(heard.count("stdout"), heard[-1])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=STANDIN, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2000", "execution_complete"]


async def test_a_command_ends_at_its_time_limit(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    opts = RunCommandOpts(timeout=timedelta(seconds=1))
    async with asyncio.timeout(20):
        execution = await CommandsAdapter(*endpoint).run("sleep 3600", opts=opts)
    assert execution.error is not None


async def test_a_client_that_leaves_ends_its_command(
    session: aiohttp.ClientSession, endpoint: tuple[ConnectionConfig, SandboxEndpoint], eventually: Eventually
):
    async with session.post("/command", json={"command": "echo begun; sleep 3600"}) as answer:
        init = json.loads(await answer.content.readuntil(b"\n\n"))
        answer.close()

    async def ended() -> bool:
        return not (await CommandsAdapter(*endpoint).get_command_status(init["text"])).running

    assert await eventually(ended)


async def test_many_commands_at_once(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    commands = CommandsAdapter(*endpoint)
    done = await asyncio.gather(*(commands.run(f"echo {n}") for n in range(30)))
    assert [lines(each)[0] for each in done] == [[str(n)] for n in range(30)]


async def test_a_shell_session_keeps_variables_and_folder(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    commands = CommandsAdapter(*endpoint)
    one = await commands.create_session(working_directory="/tmp")
    await commands.run_in_session(one, "export KEPT='a b'; mkdir -p /tmp/kept; cd /tmp/kept")
    assert lines(await commands.run_in_session(one, 'echo "$KEPT"; pwd'))[0] == ["a b", "/tmp/kept"]
    failed = await commands.run_in_session(one, "exit 3")
    assert failed.exit_code == 3
    assert lines(await commands.run_in_session(one, "pwd", working_directory="/"))[0] == ["/"]
    await commands.delete_session(one)
    with pytest.raises(SandboxApiException) as caught:
        await commands.run_in_session(one, "pwd")
    assert caught.value.status_code == 404


async def test_metrics(endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    metrics = await MetricsAdapter(*endpoint).get_metrics("any")
    assert metrics.cpu_count >= 1
    assert metrics.memory_total_in_mib > 0


async def test_metrics_as_a_stream(session: aiohttp.ClientSession):
    async with session.get("/metrics/watch") as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        samples: list[dict[str, Any]] = []
        while len(samples) < 5:
            line = (await answer.content.readline()).strip().removeprefix(b"data:")
            samples += [json.loads(line)] if line else []
    assert all("cpu_used_pct" in sample for sample in samples), "nothing else; the command line would not read it"
    assert samples[0]["timestamp"] < samples[1]["timestamp"]


# proxy


async def head(session: aiohttp.ClientSession, method: str, path: str, **given: Any) -> list[str]:
    """The head that the program got."""
    async with session.request(method, path, **given) as answer:
        assert answer.status == 200
        return (await answer.text()).splitlines()


async def test_proxy_to_a_program(session: aiohttp.ClientSession):
    got = await head(session, "PUT", "/proxy/3000/a/b?x=1&y=%2B", data=b"body", headers={"X-Mine": "1"})
    assert got[0] == "PUT /a/b?x=1&y=%2B HTTP/1.1"
    assert "X-Mine: 1" in got
    assert "Content-Length: 4" in got


async def test_proxy_changes_these_heads(session: aiohttp.ClientSession):
    forged = {
        "Host": "app.example",
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil",
    }
    got = await head(session, "GET", "/proxy/3000/", headers=forged)
    assert "Host: app.example" in got
    assert "X-Forwarded-Proto: http" in got
    assert not [line for line in got if line.lower().startswith("x-forwarded-host")]
    assert not [line for line in got if line == "X-Forwarded-For: 6.6.6.6"]


async def test_proxy_decodes_an_encoded_slash(sandbox: Sandbox, session: aiohttp.ClientSession):
    """Why user traffic does not go through the agent where it need not."""
    reader, writer = await asyncio.open_connection(*sandbox.agent.split(":"))
    writer.write(f"GET /proxy/3000/a%2Fb HTTP/1.1\r\nHost: x\r\n{TOKEN_HEADER}: {TOKEN}\r\n\r\n".encode())
    got = (await reader.read()).decode()
    writer.close()
    assert "GET /a/b HTTP/1.1" in got


async def test_a_connection_is_good_for_the_next_request_unless_its_answer_says_otherwise(sandbox: Sandbox):
    """Clients send commands on the connection of their last ping, and repeat no command."""
    reader, writer = await asyncio.open_connection(*sandbox.agent.split(":"))
    asked = f"GET /proxy/44772/ping HTTP/1.1\r\nHost: x\r\n{TOKEN_HEADER}: {TOKEN}\r\n\r\n".encode()
    writer.write(asked)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert head.startswith("http/1.1 200")
    if "connection: close" not in head:
        writer.write(asked)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_proxy_to_nobody(session: aiohttp.ClientSession):
    """The server knows it by exactly this."""
    async with session.get("/proxy/3001/") as answer:
        assert (answer.status, await answer.read()) == (502, b"Bad Gateway\n")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_proxy_streams(session: aiohttp.ClientSession, endpoint: tuple[ConnectionConfig, SandboxEndpoint]):
    """The first event arrives before the program has written the second."""
    async with session.get("/proxy/3000/stream") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert await answer.content.readuntil(b"\n\n") == b"data: 1\n\n"
        await CommandsAdapter(*endpoint).run("echo go > /tmp/go")
        assert await answer.content.readuntil(b"\n\n") == b"data: 2\n\n"


async def test_proxy_switches_protocols(sandbox: Sandbox, session: aiohttp.ClientSession):
    reader, writer = await asyncio.open_connection(*sandbox.agent.split(":"))
    asked = ["GET /proxy/3000/socket HTTP/1.1", "Host: x", f"{TOKEN_HEADER}: {TOKEN}", "Connection: Upgrade"]
    asked += ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    writer.write("\r\n".join([*asked, "Sec-WebSocket-Protocol: chat", "", ""]).encode())
    answered = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert answered.startswith("HTTP/1.1 101 ")
    assert "Sec-WebSocket-Protocol: chat\r\n" in answered
    for sent in (b"\x81\x85\0\0\0\0hello", bytes(range(256)) * 100):
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
    writer.close()
