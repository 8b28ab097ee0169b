"""The public server and ours get the same requests, on the same engine with the same agent. Each difference is listed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import aiodocker
import httpx
import pytest

from tests.agent.image import ensure_agent_image
from tests.chaos.harness import KEY, ServerProcess
from tests.differential.cases import ABSENT, BODY, Case, every
from tests.differential.differences import LATER, LISTED, Difference, judge
from tests.differential.seen import Discrepancy, Seen, compare, dumped
from tests.support.environments import fetched
from tests.support.public import public_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
STAGES: dict[str, dict[str, Any]] = {
    "running": {},
    "paused": {},
    "endless": {"timeout": ...},
    "exited": {"entrypoint": ["sh", "-c", "exit 0"]},
}
KEYS = {"right": KEY, "wrong": "another-key-0123456789"}
MANY = 300


class Subject:
    """One of the two servers."""

    def __init__(self, base: str, image: str) -> None:
        self.base, self.image = base, image
        self.names = {"absent": ABSENT}
        self.seen: dict[str, Seen] = {}

    async def run(self, cases: list[Case]) -> None:
        async with httpx.AsyncClient(base_url=self.base, timeout=60) as http:
            for name, changes in STAGES.items():  # one after the other, so that lists have one order
                await self._stage(http, name, changes)
            for case in cases:
                answer = await self._send(http, case)
                self.seen[case.name] = Seen.of(answer)
                if case.path == "/v1/sandboxes" and case.method == "POST" and answer.status_code == 202:
                    await http.delete(f"/v1/sandboxes/{answer.json()['id']}", headers=_key("right"))

    async def _send(self, http: httpx.AsyncClient, case: Case) -> httpx.Response:
        content = case.content(self.image)
        headers = _key(case.key) | ({} if content is None else {"Content-Type": "application/json"}) | case.headers
        path = case.path
        for name, sandbox in self.names.items():
            path = path.replace(f"{{{name}}}", sandbox)
        return await http.request(case.method, path, content=content, headers=headers)

    async def _stage(self, http: httpx.AsyncClient, name: str, changes: dict[str, Any]) -> None:
        body = {key: value for key, value in (BODY | changes).items() if value is not ...}
        asked = Case(name, "POST", "/v1/sandboxes", body, {"Prefer": "wait=60"})
        made = await self._send(http, asked)
        assert made.status_code == 202, made.text
        self.names[name] = made.json()["id"]
        wanted = {"exited": "Terminated"}.get(name, "Running")
        async with asyncio.timeout(60):
            while (state := await self._state(http, name)) != wanted:
                assert state in ("Pending", "Running"), state
                await asyncio.sleep(0.05)
            # An engine under load may fail to freeze a container that has just started, and the public server says so.
            while name == "paused" and await self._state(http, name) != "Paused":
                await self._send(http, Case("pause", "POST", "/v1/sandboxes/{paused}/pause"))

    async def _state(self, http: httpx.AsyncClient, name: str) -> str:
        answer = await self._send(http, Case("get", "GET", f"/v1/sandboxes/{{{name}}}"))
        return answer.json()["status"]["state"]


def _key(which: str | None) -> dict[str, str]:
    return {} if which is None else {"OPEN-SANDBOX-API-KEY": KEYS[which]}


async def test_every_difference_is_listed(
    serve: Callable[..., Awaitable[ServerProcess]],
    docker: aiodocker.Docker,
    docker_host: str,
    image: str,
    tmp_path: Path,
):
    await asyncio.to_thread(fetched, "public")
    agent = os.environ.get("SANDLEDGER_AGENT_IMAGE") or await ensure_agent_image(docker)
    cases = every()
    assert len(cases) >= MANY
    ours = await serve(runtime=f'execd_image = "{agent}"')
    with public_server(tmp_path, docker_host, agent, KEY) as theirs:
        subjects = [Subject(theirs, image), Subject(ours.base, image)]
        try:
            await asyncio.gather(*(subject.run(cases) for subject in subjects))
        finally:
            await _clear(docker, subjects[0].names.values())
    for name, subject in zip(("theirs", "ours"), subjects, strict=True):
        (tmp_path / f"{name}.json").write_text(dumped(subject.seen))
    one, other = (subject.seen for subject in subjects)
    found = [each for name in one for each in compare(name, one[name], other[name])]
    unexplained, unused = judge(found, LISTED, LATER)
    told = "\n".join(map(str, unexplained))
    assert not unexplained, f"{len(unexplained)} of {len(found)} differences are not listed ({tmp_path}):\n{told}"
    assert not unused, f"listed, and no longer seen: {[each.name for each in unused]}"


async def _clear(docker: aiodocker.Docker, sandboxes: Iterable[str]) -> None:
    """Remove what the public server still has of these. Ours are removed with our server."""
    for sandbox in sandboxes:
        filters = json.dumps({"label": [f"opensandbox.io/id={sandbox}"]})
        for container in await docker.containers.list(all=True, filters=filters):
            await container.delete(force=True)


# The judge itself


def test_a_difference_that_is_not_listed_is_noticed():
    found = [Discrepancy("a", "status", "200", "201"), Discrepancy("b", "code", "X", "Y")]
    listed = [Difference("statuses", "why", what="status"), Difference("stale", "why", what="header date")]
    unexplained, unused = judge(found, listed)
    assert unexplained == found[1:]
    assert [each.name for each in unused] == ["stale"]


@pytest.mark.parametrize(
    ("theirs", "ours", "what"),
    [
        ({"status": 200}, {"status": 201}, ["status"]),
        ({"code": "A"}, {"code": "B"}, ["code"]),
        ({"headers": {"allow": "GET"}}, {}, ["header allow"]),
        ({"shape": {"$": "object", "$.a": "str"}}, {"shape": {"$": "object", "$.a": "int"}}, ["body $.a"]),
        ({}, {"shape": {"$": "list"}}, ["body $"]),
        ({}, {}, []),
    ],
)
def test_what_is_a_difference(theirs: dict[str, Any], ours: dict[str, Any], what: list[str]):
    plain: dict[str, Any] = {"status": 200, "headers": {}, "code": "", "shape": {}}
    found = compare("case", Seen(**(plain | theirs)), Seen(**(plain | ours)))
    assert [each.what for each in found] == what
