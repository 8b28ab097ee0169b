"""Canary secrets: put in everywhere, found nowhere but in the container's own environment."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID, uuid4

import aiodocker
import pytest

from app.store.embedded.server import EmbeddedPostgres, binaries
from tests.chaos.harness import KEY, Engine, ServerProcess, body, reaches

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]


def forms(secret: str) -> list[bytes]:
    """The ways a value can lie about: plain, base64, hexadecimal, as pg_dump prints bytea."""
    return [secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="), secret.encode().hex().encode()]


async def test_no_secret_in_log_labels_answers_or_process_logs(
    serve: Serve,
    engine: Engine,
    docker: aiodocker.Docker,
    image: str,
    installation: UUID,
    dsn: str,
    postgres: EmbeddedPostgres,
) -> None:
    secret, password = f"canary-env-{uuid4().hex}", f"canary-registry-{uuid4().hex}"
    server = await serve("all", "canary", sandledger="", server="max_sandbox_timeout_seconds = 86400")
    answers: list[str] = []
    async with server.client() as client:
        wanted = body(image, env={"TOKEN": secret, "EMPTY": ""})
        # The program prints what it was given, to both streams and in two forms.
        wanted["entrypoint"] = ["sh", "-c", 'env; env >&2; printf %s "$TOKEN" | base64; echo said; exec sleep 3600']
        wanted["image"]["auth"] = {"username": "robot", "password": password}
        key = {"Idempotency-Key": uuid4().hex}

        async def ask(method: str, path: str, **kwargs: object) -> dict[str, object]:
            answer = await client.request(method, path, **kwargs)  # pyright: ignore[reportArgumentType]
            answers.append(f"{answer.status_code} {dict(answer.headers)} {answer.text}")
            return answer.json() if answer.text else {}

        made = await ask("POST", "/sandboxes", json=wanted, headers={**key, "Prefer": "wait=60"})
        sandbox = str(made["id"])
        await reaches(client, sandbox, "Running")
        # Errors: replay, reuse, every kind of refusal with the secret in the offending place.
        await ask("POST", "/sandboxes", json=wanted, headers=key)
        await ask("POST", "/sandboxes", json={**wanted, "timeout": 99}, headers=key)
        missing = {**wanted, "image": {**wanted["image"], "uri": "127.0.0.1:1/no/such:image"}}
        failed = await ask("POST", "/sandboxes", json=missing)
        for broken in (
            {**wanted, "env": {"TOKEN": [secret]}},
            {**wanted, "env": secret},
            {**wanted, "timeout": secret},
            {**wanted, "entrypoint": {"a": secret}},
            {**wanted, "resourceLimits": {"memory": secret}},
            {**wanted, "metadata": {"a": secret + "!"}},
            {**wanted, "platform": {"os": secret, "arch": secret}},
            {**wanted, "image": {"uri": image, "auth": {"username": "u", "password": [password]}}},
            {**wanted, "volumes": [{"name": "v", "mountPath": "/v", "ossfs": {"accessKeySecret": secret}}]},
            {**wanted, "env": {"TOKEN": secret + "\u0000"}},
        ):
            await ask("POST", "/sandboxes", json=broken)
        await ask("POST", "/sandboxes", content=json.dumps(wanted)[:-1])
        await ask("POST", f"/sandboxes/{sandbox}/renew-expiration", json={"expiresAt": secret})
        await ask("PATCH", f"/sandboxes/{sandbox}/metadata", json={"a": [secret]})
        for path in ("", f"/{sandbox}", f"/{sandbox}/events", f"/{failed['id']}/events", "?state=Pending"):
            await ask("GET", f"/sandboxes{path}")
        diagnostics = [f"/sandboxes/{sandbox}/diagnostics/{kind}" for kind in ("logs", "events", "inspect", "summary")]
        async with asyncio.timeout(30):
            while "said" not in (await client.get(diagnostics[0])).text:
                await asyncio.sleep(0.05)
        shown = (*diagnostics, f"{diagnostics[0]}?scope=all")
        answers += [(await client.get(path)).text for path in shown]
        assert "TOKEN=***" in answers[-1]
        (container,) = await engine.containers(sandbox=sandbox)
        shown = await docker.containers.container(container["Id"]).show()
        assert f"TOKEN={secret}" in shown["Config"]["Env"], "inside the container the value is needed"
        before = await _dump(dsn)
        for item in (sandbox, failed["id"]):
            await ask("DELETE", f"/sandboxes/{item}")
        await reaches(client, sandbox, "Terminated")
        answers += [(await client.get(path)).text for path in diagnostics]
        assert "TOKEN=***" in answers[-1], "its end was kept"
        after = await _dump(dsn)

    places = {
        "answers": "\n".join(answers).encode(),
        "process log": server.log.read_bytes(),
        "labels": json.dumps([container["Labels"], shown["Config"]["Labels"]]).encode(),
        "command line": json.dumps([shown["Path"], shown["Args"], shown["Config"]["Cmd"]]).encode(),
        "database while it lives": before,
        "database after its end": after,
        "PostgreSQL log": b"".join(path.read_bytes() for path in Path(postgres.log_dir).rglob("*") if path.is_file()),
    }
    assert b"sealed_values" in before and b"\\x" in before, "the dump holds the sealed row"
    for place, content in places.items():
        for value in (secret, password, KEY):
            for form in forms(value):
                assert form not in content, f"{place} holds a secret"
    sealed = after.split(b"COPY sandledger.sealed_values", 1)[1].split(b"\\.", 1)[0]
    assert sandbox.encode() not in sealed, "erased with the sandbox"
    kept = after.split(b"COPY sandledger.kept_ends", 1)[1].split(b"\\.", 1)[0]
    assert b"TOKEN=***" in kept


async def _dump(dsn: str) -> bytes:
    tool = binaries() / "pg_dump"
    done = await asyncio.to_thread(subprocess.run, [str(tool), dsn], capture_output=True, check=True)
    return done.stdout
