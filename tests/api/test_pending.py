"""What a Pending sandbox says that it waits for: single reads, lists and waiting creates, from the log and the queue."""

from __future__ import annotations

from uuid import UUID

import httpx
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.queue.reconcile import Claim, Failed, Queue
from app.store.queue.waiting import WaitingRows
from tests.api.conftest import WORKER, create, observe
from tests.conftest import SIGHTING

PLAIN = ("SANDBOX_PENDING", "Sandbox is accepted; its container is being provisioned.")
FOR_SLOT = ("WAITING_FOR_SLOT", "Sandbox is accepted; it waits for a worker that is free.")


@pytest.fixture
def queue(database: Database) -> Queue:
    return Queue(database, SIGHTING.name)


async def claim(queue: Queue) -> Claim:
    """Of the one sandbox there is."""
    (taken,) = (await queue.claim(5, lease=60, tenant_slots=5)).claims
    return taken


async def told(http: httpx.AsyncClient, sandbox_id: str) -> tuple[str, str]:
    """Reason and message; a list must say the same as a single read."""
    one = (await http.get(f"/v1/sandboxes/{sandbox_id}")).json()["status"]
    (listed,) = [each for each in (await http.get("/v1/sandboxes")).json()["items"] if each["id"] == sandbox_id]
    assert listed["status"] == one
    assert one["state"] == "Pending"
    return one["reason"], one["message"]


async def test_it_waits_for_a_slot_until_a_worker_takes_it(http: httpx.AsyncClient, queue: Queue):
    made = await create(http)
    assert await told(http, made["id"]) == FOR_SLOT
    taken = await claim(queue)
    assert await told(http, made["id"]) == PLAIN
    await queue.release(taken)
    assert await told(http, made["id"]) == FOR_SLOT


async def test_progress_of_a_pull(http: httpx.AsyncClient, service: Service, queue: Queue, database: Database):
    made = await create(http)
    sandbox_id = UUID(made["id"])
    taken = await claim(queue)
    pulling = cmd.RecordWaiting("fetch", "IMAGE_PULLING", "Image busybox:1 is being pulled.")
    await service.execute(sandbox_id, ANY_TENANT, pulling, WORKER)
    await queue.defer(taken, 60)
    tag = (await http.get(f"/v1/sandboxes/{made['id']}")).headers["etag"]
    for far in ("1 of 2 layers, 3.1 of 9.4 MB", "2 of 2 layers, 9.4 of 9.4 MB."):
        assert await WaitingRows(database).keep_waiting({sandbox_id: far}, 60) == {sandbox_id}
        reason, message = await told(http, made["id"])
        assert (reason, message) == ("IMAGE_PULLING", f"Image busybox:1 is being pulled. {far.rstrip('.')}.")
    now = await http.get(f"/v1/sandboxes/{made['id']}")
    assert now.headers["etag"] == tag, "progress is no event"
    past = await http.get(f"/v1/sandboxes/{made['id']}", params={"asOf": "2100-01-01T00:00:00Z"})
    assert past.json()["status"]["message"] == "Image busybox:1 is being pulled.", "nobody recorded how far it was"


@pytest.mark.parametrize(
    ("attempts", "first"), [(3, "Attempt 3"), (0, "The last attempt")], ids=["counted", "trouble of the engine"]
)
async def test_the_last_error_with_its_attempt(http: httpx.AsyncClient, queue: Queue, attempts: int, first: str):
    made = await create(http)
    taken = await claim(queue)
    why = Failed(attempts, "START_FAILED", "the engine says 500: no space left on device")
    await queue.defer(taken, 0, failed=why)
    failed = f"{first} failed with START_FAILED: the engine says 500: no space left on device"
    assert await told(http, made["id"]) == (FOR_SLOT[0], f"{FOR_SLOT[1]} {failed}; it will be repeated.")
    again = await claim(queue)
    accepted = "Sandbox is accepted; it could not be provided yet."
    assert await told(http, made["id"]) == ("START_FAILED", f"{accepted} {failed}; the next one is under way.")
    await queue.defer(again, 60, failed=why)
    assert await told(http, made["id"]) == ("START_FAILED", f"{accepted} {failed}; it will be repeated.")


async def test_an_error_cannot_drive_a_terminal(http: httpx.AsyncClient, queue: Queue):
    made = await create(http)
    await queue.defer(await claim(queue), 60, failed=Failed(1, "START_FAILED", "\x1b]0;owned\x07\u202e"))
    assert "\\x1b]0;owned\\x07\\u202e" in (await told(http, made["id"]))[1]


async def test_a_create_that_waited_says_it_too(http: httpx.AsyncClient):
    made = await create(http, {"Prefer": "wait=1"})
    assert (made["status"]["reason"], made["status"]["message"]) == FOR_SLOT
    unwaited = await create(http)
    assert (unwaited["status"]["reason"], unwaited["status"]["message"]) == PLAIN


async def test_what_runs_says_nothing_of_the_queue(http: httpx.AsyncClient, service: Service, queue: Queue):
    made = await create(http)
    await queue.defer(await claim(queue), 60, failed=Failed(2, "START_FAILED", "no"))
    await observe(service, made["id"])
    status = (await http.get(f"/v1/sandboxes/{made['id']}")).json()["status"]
    assert (status["reason"], status["message"]) == ("CONTAINER_RUNNING", "Sandbox container is running.")
    assert (await http.get("/v1/sandboxes")).json()["items"][0]["status"] == status
