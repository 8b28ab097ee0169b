"""The whole document in sequences: what one answer names is used by the next request, while a worker does its part."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from app.runtime.fake import FakeDriver, FakeEngine
from app.service.engines import Engines
from app.work.worker import Worker
from tests.api.conftest import KEY, body
from tests.api.live import Live, serving
from tests.api.test_document import CHECKS, operations
from tests.conftest import INSTALLATION, SIGHTING
from tests.work.stage import QUICK

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # schemathesis does
HEADERS = {"OPEN-SANDBOX-API-KEY": KEY}
READY = {"Prefer": "wait=5"}
SECRET = "s3cr3t-of-a-sequence"
OFTEN = ["createSandbox", "createSnapshot", "createSnapshot", "pauseSandbox", "resumeSandbox", "getSandboxLogs"]
"""What the others need."""
FREE_OF_RULES = {"listSnapshots", "listSandboxes", "getSandbox"}
SHORTEST_SECRET = 8
"""Shorter values may stand in an answer by chance."""
POLICY = msgspec.structs.replace(QUICK, engine_beat=5, progress_every=1, sweep_tick=5)


@pytest.fixture
def live(dsn: str) -> Iterator[Live]:
    with serving(dsn, api_key=KEY, power_wait_seconds=0.1, wait_seconds_max=5, diagnostics_wait_seconds=2) as server:
        worker, running = server.run(working(server))
        try:
            yield server
        finally:
            server.run(ended(worker, running))


async def working(server: Live) -> tuple[Worker, asyncio.Task[None]]:
    """A worker on a fake engine, on the server's own loop."""
    parts, engine = server.context, FakeEngine()
    engine.engine_id, engine.marks[INSTALLATION] = SIGHTING.engine_id, SIGHTING.mark or ""
    worker = Worker(
        database=parts.database,
        service=parts.service,
        signal=parts.signal,
        engines=Engines(parts.database, parts.signal, INSTALLATION, parts.service.engines),
        driver=FakeDriver(engine, INSTALLATION, name=SIGHTING.name),
        sealer=parts.sealer,
        policy=POLICY,
        worker_id="w1",
    )
    return worker, asyncio.create_task(worker.run())


async def ended(worker: Worker, running: asyncio.Task[None]) -> None:
    await worker.stop(5)
    await running


def secrets(sent: Any) -> set[str]:
    """Values of a create that no answer may have."""
    if not isinstance(sent, dict):
        return set()
    env, image = sent.get("env"), sent.get("image")
    auth = image.get("auth") if isinstance(image, dict) else None
    values = [*(env.values() if isinstance(env, dict) else ()), *(auth.values() if isinstance(auth, dict) else ())]
    return {value for value in values if isinstance(value, str) and len(value) >= SHORTEST_SECRET}


class Known:
    """What answers have named. Random input alone is nearly always refused."""

    def __init__(self, live: Live) -> None:
        self.ids: dict[str, list[str]] = {"sandboxId": [], "snapshotId": []}
        with httpx.Client(base_url=live.base, headers=HEADERS) as http:
            for _ in range(3):
                self.heard("createSandbox", http.post("/v1/sandboxes", json=body(), headers=READY))

    def heard(self, operation: str, answer: Any) -> None:
        name = {"createSandbox": "sandboxId", "createSnapshot": "snapshotId"}.get(operation)
        if name is not None:
            self.ids[name].append(answer.json()["id"])

    def mend(self, operation: str, case: Case, number: int) -> None:
        """Have it be a request that may succeed. `number` chooses."""
        for name, ids in self.ids.items():
            if name in (case.path_parameters or {}) and ids:
                case.path_parameters[name] = ids[-1 - number % len(ids)]
        if operation == "createSandbox":
            snapshots = self.ids["snapshotId"] if number % 2 else []
            source = {"snapshotId": snapshots[-1], "image": None} if snapshots else {}
            case.body = body(env={"TOKEN": SECRET}, **source)
            case.headers.update(READY)
        elif operation in FREE_OF_RULES:
            case.query.clear()


def run(live: Live, examples: int, steps: int) -> Counter[str]:
    """Sequences of requests. Says how many of each operation succeeded.

    What is sent is drawn before the first of them is answered, so that it does not depend on how fast the worker is.
    """
    schema = schemathesis.openapi.from_url(f"{live.base}/openapi.json")
    named = {name: schema.find_operation_by_id(name) for name in operations()}
    succeeded: Counter[str] = Counter()
    known = Known(live)

    def step(name: str) -> st.SearchStrategy[Any]:
        modes = [named[name].as_strategy(generation_mode=mode) for mode in GenerationMode]
        return st.tuples(st.just(name), st.one_of(modes), st.integers(0, 9))

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.sampled_from(OFTEN + operations()).flatmap(step), min_size=steps, max_size=steps))
    def fuzz(sequence: list[tuple[str, Case, int]]) -> None:
        for name, case, number in sequence:
            if number:  # one in ten is sent as it was made up
                known.mend(name, case, number)
            response = case.call(headers=HEADERS)
            assert response.status_code < 500 or response.status_code in DOCUMENTED_FAULTS, response.text
            if response.content != b"Invalid HTTP request received.":  # uvicorn's parser; it never came to us
                case.validate_response(response, checks=CHECKS)
            told = response.text + str(response.headers)
            assert not [value for value in secrets(case.body) if value in told], name
            if response.status_code < 300:
                succeeded[name] += 1
                known.heard(name, response)

    fuzz()
    return succeeded


DOCUMENTED_FAULTS = {501, 502, 503}
"""They are in the document, and the checks compare: not served, without a sidecar, an engine that does not answer."""


def test_sequences(live: Live):
    succeeded = run(live, 25, 8)
    assert {"createSandbox", "createSnapshot", "getSandboxLogs"} <= succeeded.keys(), succeeded


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_many_long_sequences(live: Live):
    succeeded = run(live, 100, 20)
    assert {"createSnapshot", "pauseSandbox", "deleteSandbox"} <= succeeded.keys(), succeeded
