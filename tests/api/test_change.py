"""DELETE, metadata, renewals, pause and resume; preconditions on all of them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from msgspec.structs import replace

from app.api.app import create_app
from app.domain.engine.decide import RecordSighting
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Capabilities, Pausing, Power
from app.domain.tenants import ANY_TENANT
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.api.conftest import KEY, WORKER, MakeContext, client, create, observe
from tests.conftest import INSTALLATION, SIGHTING, STATION


async def at(http: httpx.AsyncClient, service: Service, power: Power | None = None) -> str:
    """Path of a sandbox that the engine shows in this power."""
    made = await create(http)
    if power is Power.PAUSED:
        await observe(service, made["id"])
        await http.post(f"/v1/sandboxes/{made['id']}/pause", headers={"Prefer": "respond-async"})
    if power is not None:
        await observe(service, made["id"], power)
    return f"/v1/sandboxes/{made['id']}"


async def state(http: httpx.AsyncClient, path: str) -> str:
    return (await http.get(path, params={"includeTerminal": "true"})).json()["status"]["state"]


async def test_delete_answers_at_once_and_once(http: httpx.AsyncClient, service: Service):
    path = await at(http, service, Power.RUNNING)
    answer = await http.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert await state(http, path) == "Stopping"
    again = await http.delete(path)
    assert (again.status_code, again.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")


async def test_metadata_is_merged(http: httpx.AsyncClient):
    made = await create(http, metadata={"keep": "1", "drop": "2", "change": "3"})
    path = f"/v1/sandboxes/{made['id']}/metadata"
    answer = await http.patch(path, json={"drop": None, "change": "4", "new": "5", "absent": None})
    assert answer.status_code == 200
    assert answer.json()["metadata"] == {"keep": "1", "change": "4", "new": "5"}
    assert answer.json()["image"] == {"uri": "busybox:1"}
    assert answer.headers["etag"] == '"3"'
    same = await http.patch(path, json={}, headers={"Content-Type": "application/merge-patch+json"})
    assert (same.status_code, same.headers["etag"]) == (200, '"3"')
    empty = await http.patch(path, json=dict.fromkeys(("keep", "change", "new")))
    assert "metadata" not in empty.json()


@pytest.mark.parametrize(
    ("patch", "status", "code"),
    [
        ({"opensandbox.io/x": "1"}, 400, "INVALID_METADATA_LABEL"),
        ({"opensandbox.io/x": None}, 400, "INVALID_METADATA_LABEL"),
        ({"a b": "1"}, 400, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"a": "b c"}, 400, "SANDBOX::INVALID_METADATA_LABEL"),
        ({f"k{n}": "v" for n in range(10_000)}, 400, "SANDBOX::INVALID_PARAMETER"),
        ({"a": 1}, 422, "GENERAL::VALIDATION_ERROR"),
        (["a"], 422, "GENERAL::VALIDATION_ERROR"),
        ({"a": "\0"}, 422, "GENERAL::VALIDATION_ERROR"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_metadata_rules(http: httpx.AsyncClient, patch: Any, status: int, code: str):
    made = await create(http)
    answer = await http.patch(f"/v1/sandboxes/{made['id']}/metadata", json=patch)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_the_number_of_entries_is_the_operators(make_context: MakeContext):
    for most, status in ((2, 400), (None, 200)):
        app = create_app(make_context(metadata_max_entries=most))
        async with client(app, **{"open-sandbox-api-key": KEY}) as http:
            made = await create(http, metadata={"a": "1", "b": "2"})
            answer = await http.patch(f"/v1/sandboxes/{made['id']}/metadata", json={"c": "3"})
            assert answer.status_code == status


# Renewals


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("2040-01-31T12:00:00Z", "2040-01-31T12:00:00Z"),
        ("2040-01-31T12:00:00.000001+02:00", "2040-01-31T10:00:00.000001Z"),
        ("2040-01-31T12:00:00", "2040-01-31T12:00:00Z"),
        (2211624000, "2040-01-31T12:00:00Z"),
        (2211624000.5, "2040-01-31T12:00:00.500000Z"),
        (2211624000000, "2040-01-31T12:00:00Z"),
        ("9998-12-31T23:59:59Z", "9998-12-31T23:59:59Z"),
    ],
)
async def test_a_renewal_in_any_spelling(http: httpx.AsyncClient, sent: Any, meant: str):
    made = await create(http)
    path = f"/v1/sandboxes/{made['id']}"
    answer = await http.post(f"{path}/renew-expiration", json={"expiresAt": sent})
    assert (answer.status_code, answer.json()) == (200, {"expiresAt": meant})
    assert answer.headers["etag"] == '"3"'
    assert (await http.get(path)).json()["expiresAt"] == meant
    sooner = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    shortened = await http.post(f"{path}/renew-expiration", json={"expires_at": sooner})
    assert shortened.status_code == 200


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ("2020-01-01T00:00:00Z", 400, "DOCKER::INVALID_EXPIRATION"),
        (0, 400, "DOCKER::INVALID_EXPIRATION"),
        (-1e18, 400, "SANDBOX::INVALID_PARAMETER"),
        (1e300, 400, "SANDBOX::INVALID_PARAMETER"),
        (10**40, 400, "SANDBOX::INVALID_PARAMETER"),
        (int("9" * 4000), 400, "SANDBOX::INVALID_PARAMETER"),
        ("9999-12-31T23:59:59-05:00", 400, "SANDBOX::INVALID_PARAMETER"),
        ("9999-12-31T23:59:59Z", 400, "SANDBOX::INVALID_PARAMETER"),
        ("9999-01-01T00:00:00Z", 400, "SANDBOX::INVALID_PARAMETER"),
        ("tomorrow", 422, "GENERAL::VALIDATION_ERROR"),
        ("2040-02-30T00:00:00Z", 422, "GENERAL::VALIDATION_ERROR"),
        ("", 422, "GENERAL::VALIDATION_ERROR"),
        (None, 422, "GENERAL::VALIDATION_ERROR"),
        (True, 422, "GENERAL::VALIDATION_ERROR"),
        ([], 422, "GENERAL::VALIDATION_ERROR"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_renewal_rules(http: httpx.AsyncClient, sent: Any, status: int, code: str):
    made = await create(http)
    answer = await http.post(f"/v1/sandboxes/{made['id']}/renew-expiration", json={"expiresAt": sent})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (await http.get(f"/v1/sandboxes/{made['id']}")).headers["etag"] == '"2"'


async def test_what_never_expires_is_not_renewed(http: httpx.AsyncClient):
    made = await create(http, timeout=None)
    answer = await http.post(f"/v1/sandboxes/{made['id']}/renew-expiration", json={"expiresAt": "2040-01-01T00:00:00Z"})
    assert (answer.status_code, answer.json()["code"]) == (409, "DOCKER::INVALID_EXPIRATION")


async def test_a_renewal_honours_the_longest_timeout(make_context: MakeContext):
    app = create_app(make_context(max_sandbox_timeout_seconds=3600))
    async with client(app, **{"open-sandbox-api-key": KEY}) as http:
        made = await create(http)
        far = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
        answer = await http.post(f"/v1/sandboxes/{made['id']}/renew-expiration", json={"expiresAt": far})
        assert (answer.status_code, answer.json()["code"]) == (400, "SANDBOX::INVALID_PARAMETER")


# Pause and resume


async def test_pause_and_resume_answer_when_it_is_done(http: httpx.AsyncClient, service: Service):
    path = await at(http, service, Power.RUNNING)
    for verb, under_way, power, final in (
        ("pause", "Pausing", Power.PAUSED, "Paused"),
        ("resume", "Resuming", Power.RUNNING, "Running"),
    ):
        asked = asyncio.create_task(http.post(f"{path}/{verb}"))
        async with asyncio.timeout(10):
            while await state(http, path) != under_way:
                await asyncio.sleep(0.01)
        assert not asked.done()
        await observe(service, path.rpartition("/")[2], power)
        answer = await asked
        assert (answer.status_code, answer.content) == (202, b"")
        assert "preference-applied" not in answer.headers
        assert await state(http, path) == final


async def test_pause_does_not_wait_when_told_so(http: httpx.AsyncClient, service: Service):
    for prefer, applied in (("respond-async", "respond-async"), ("wait=0", "wait=0")):
        path = await at(http, service, Power.RUNNING)
        answer = await http.post(f"{path}/pause", headers={"Prefer": prefer})
        assert answer.status_code == 202
        assert answer.headers["preference-applied"] == applied
        assert answer.headers["etag"] == '"6"'
        assert await state(http, path) == "Pausing"


async def test_pause_that_ends_in_failure_is_still_accepted(http: httpx.AsyncClient, service: Service):
    path = await at(http, service, Power.RUNNING)
    asked = asyncio.create_task(http.post(f"{path}/pause"))
    async with asyncio.timeout(10):
        while await state(http, path) != "Pausing":
            await asyncio.sleep(0.01)
    await observe(service, path.rpartition("/")[2], Power.EXITED)
    assert (await asked).status_code == 202
    assert await state(http, path) == "Failed"


@pytest.mark.parametrize(
    ("verb", "before", "under_way", "after"),
    [("pause", Power.RUNNING, "Pausing", "Running"), ("resume", Power.PAUSED, "Resuming", "Paused")],
)
async def test_what_the_engine_refuses_costs_nothing(
    http: httpx.AsyncClient, service: Service, verb: str, before: Power, under_way: str, after: str
):
    path = await at(http, service, before)
    asked = asyncio.create_task(http.post(f"{path}/{verb}"))
    async with asyncio.timeout(10):
        while await state(http, path) != under_way:
            await asyncio.sleep(0.01)
    refused = cmd.RecordPowerRefused("POWER_REFUSED", "cannot freeze: cgroup is busy")
    await service.execute(UUID(path.rpartition("/")[2]), ANY_TENANT, refused, WORKER)
    assert (await asked).status_code == 202
    assert await state(http, path) == after
    last = (await http.get(f"{path}/events")).json()["items"][-1]
    assert last["type"] == f"sandbox.{verb}_failed"
    assert last["data"] == {"reason": "POWER_REFUSED", "message": "cannot freeze: cgroup is busy"}


@pytest.mark.parametrize(
    ("verb", "power", "code"),
    [
        ("pause", None, "DOCKER::SANDBOX_NOT_RUNNING"),
        ("pause", Power.PAUSED, "DOCKER::SANDBOX_NOT_RUNNING"),
        ("resume", None, "DOCKER::SANDBOX_NOT_PAUSED"),
        ("resume", Power.RUNNING, "DOCKER::SANDBOX_NOT_PAUSED"),
    ],
)
async def test_pause_and_resume_in_a_wrong_state(
    http: httpx.AsyncClient, service: Service, verb: str, power: Power | None, code: str
):
    path = await at(http, service, power)
    answer = await http.post(f"{path}/{verb}")
    assert (answer.status_code, answer.json()["code"]) == (409, code)


async def test_an_engine_that_cannot_pause(
    http: httpx.AsyncClient, service: Service, database: Database, signal: Signal
):
    path = await at(http, service, Power.RUNNING)
    engines = Engines(database, signal, INSTALLATION, service.engines)
    unable = replace(SIGHTING, capabilities=Capabilities(pause=Pausing.NONE))
    await engines.execute(SIGHTING.name, RecordSighting(unable), STATION)
    answer = await http.post(f"{path}/pause")
    assert (answer.status_code, answer.json()["code"]) == (501, "SANDBOX::API_NOT_SUPPORTED")
    assert await state(http, path) == "Running"
    assert (await http.get(path)).headers["etag"] == '"5"', "nothing was appended"


# All of them

CHANGES: list[tuple[str, str, Any]] = [
    ("DELETE", "", None),
    ("POST", "/pause", None),
    ("POST", "/resume", None),
    ("POST", "/renew-expiration", {"expiresAt": "2040-01-01T00:00:00Z"}),
    ("PATCH", "/metadata", {"a": "b"}),
]


@pytest.mark.parametrize(("method", "suffix", "sent"), CHANGES)
async def test_an_unknown_id_is_404(http: httpx.AsyncClient, method: str, suffix: str, sent: Any):
    for text in (str(uuid4()), "nonsense"):
        answer = await http.request(method, f"/v1/sandboxes/{text}{suffix}", json=sent)
        assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")


@pytest.mark.parametrize(("method", "suffix", "sent"), CHANGES)
async def test_if_match(http: httpx.AsyncClient, service: Service, method: str, suffix: str, sent: Any):
    path = await at(http, service, Power.PAUSED if suffix == "/resume" else Power.RUNNING)
    present = (await http.get(path)).headers["etag"]
    unwaited = {"Prefer": "respond-async"}
    for tag in ('"1"', f"W/{present}", '"1", "2"', '"x"', '"99999999999"', '""'):
        answer = await http.request(method, f"{path}{suffix}", json=sent, headers={"If-Match": tag} | unwaited)
        assert (answer.status_code, answer.json()["code"]) == (412, "SANDLEDGER::VERSION_MISMATCH"), tag
    for tag in ("", "3", '"3', '"a" "b"', '*, "3"', "W/*"):
        answer = await http.request(method, f"{path}{suffix}", json=sent, headers={"If-Match": tag} | unwaited)
        assert (answer.status_code, answer.json()["code"]) == (400, "GENERAL::INVALID_HEADER"), tag
    assert (await http.get(path)).headers["etag"] == present
    headers = [("If-Match", '"1"'), ("If-Match", f'W/"7" , {present}'), ("Prefer", "respond-async")]
    answer = await http.request(method, f"{path}{suffix}", json=sent, headers=headers)
    assert answer.is_success, answer.text


async def test_if_match_on_one_that_has_ended_says_that_it_has_ended(http: httpx.AsyncClient, service: Service):
    path = await at(http, service)
    stale = (await http.get(path)).headers["etag"]
    assert (await http.delete(path)).status_code == 204
    answer = await http.patch(f"{path}/metadata", json={"a": "b"}, headers={"If-Match": stale})
    assert answer.status_code == 404
    assert "deleted by api_key" in answer.json()["message"]


async def test_if_match_any(http: httpx.AsyncClient, service: Service):
    path = await at(http, service)
    assert (await http.patch(f"{path}/metadata", json={"a": "b"}, headers={"If-Match": "*"})).status_code == 200
    gone = f"/v1/sandboxes/{uuid4()}"
    assert (await http.delete(gone, headers={"If-Match": "*"})).status_code == 404
    assert (await http.delete(gone, headers={"If-Match": '"1", "2"'})).status_code == 404


async def test_of_two_with_one_version_one_wins(http: httpx.AsyncClient):
    made = await create(http)
    path = f"/v1/sandboxes/{made['id']}/metadata"
    answers = await asyncio.gather(
        *[http.patch(path, json={"winner": str(n)}, headers={"If-Match": '"2"'}) for n in range(8)]
    )
    assert sorted(answer.status_code for answer in answers) == [200, *[412] * 7]


async def test_a_change_says_who(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    await http.patch(f"/v1/sandboxes/{made['id']}/metadata", json={"a": "b"}, headers={"X-Request-ID": "r9"})
    event = (await service.history(UUID(made["id"]), "default"))[-1]
    assert (event.meta.request_id, event.meta.client, event.meta.actor.name) == ("r9", "192.0.2.7", "default")
