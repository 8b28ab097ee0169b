"""A real pgbouncer in between: refused while it drops settings, and good in session mode once the login has them."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import literal, select

from app.errors import StoreRefused
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.database.session import check_session
from app.store.database.statement import Statement
from app.store.embedded.account import account_for
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import NEWS_CHANNEL, Signal
from tests.support.cluster import free_port
from tests.support.needs import refuse_or_skip
from tests.support.sql import connected
from tests.support.stream import META, requested

ANYTHING = Statement(select(literal(1)))
BINARY = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
IGNORED = (
    "role, search_path, default_transaction_isolation, synchronous_commit, idle_in_transaction_session_timeout, jit"
)
INI = """
[databases]
* = host={socket} port=5432
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
logfile = {home}/log
server_reset_query = DISCARD ALL
ignore_startup_parameters = {ignored}
"""


class Bouncer:
    """pgbouncer in front of the embedded server."""

    def __init__(self, postgres: EmbeddedPostgres, home: Path) -> None:
        self._postgres = postgres
        self._account = account_for(postgres.data_dir)
        self._home = self._account.own(home / "bouncer")
        self._running: subprocess.Popen[str] | None = None

    async def start(self, mode: str, ignored: str, login: str, database: str) -> str:
        """A DSN through it."""
        assert BINARY is not None
        port = free_port()
        text = INI.format(
            socket=self._postgres.socket_dir, port=port, mode=mode, home=self._home, ignored=ignored
        ).replace("* =", f"{database} = user={login} dbname={database}")
        (self._home / "ini").write_text(text)
        (self._home / "ini").chmod(0o644)
        self._running = self._account.spawn(BINARY, self._home / "ini", output=subprocess.DEVNULL)
        async with asyncio.timeout(30):
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                await asyncio.sleep(0.02)
        return f"postgresql://{login}@127.0.0.1:{port}/{database}?sslmode=disable"

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.wait()


@pytest.fixture
def bouncer(postgres: EmbeddedPostgres) -> Iterator[Bouncer]:
    if BINARY is None:
        refuse_or_skip("there is no pgbouncer; .ci/apt pgbouncer installs it")
    home = Path(tempfile.mkdtemp(prefix="sandledger-bouncer-"))
    home.chmod(0o711)
    made = Bouncer(postgres, home)
    yield made
    made.stop()
    shutil.rmtree(home)


@pytest.fixture
async def login(dsn: str) -> Any:
    """Of this test alone, since settings of a login outlive a database."""
    name = f"pooled_{uuid4().hex[:8]}"
    async with connected(dsn, owner=True) as owner:
        role = await owner.fetchval("SELECT app_role FROM installation")
        await owner.execute(f"CREATE ROLE {name} LOGIN; GRANT {role} TO {name}")
        yield name, await owner.fetchval("SELECT current_database()"), owner
        await owner.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = $1", name)
        await owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_pooler_that_does_not_know_the_settings_refuses_and_we_say_what_to_do(bouncer: Bouncer, login: Any):
    name, database, _ = login
    through = Database(await bouncer.start("session", "extra_float_digits", name, database))
    with pytest.raises(StoreRefused, match="ignore_startup_parameters"):
        await through.fetch_one(ANYTHING)
    await through.close()


async def test_session_mode_works_when_the_settings_are_the_logins_own(
    bouncer: Bouncer, login: Any, dsn: str, until: Any
):
    name, database, owner = login
    pooled = await bouncer.start("session", IGNORED, name, database)
    dropping = Database(pooled)
    with pytest.raises(StoreRefused, match="not in force") as told:
        await dropping.fetch_one(ANYTHING)
    await dropping.close()
    for statement in str(told.value).partition("login's own: ")[2].split("; "):
        await owner.execute(statement.replace("DATABASE ...", f"DATABASE {database}"))
    bouncer.stop()  # its connections to the server are from before
    through = Database(await bouncer.start("session", IGNORED, name, database))
    news = Signal(through)
    service = Service(through, news)
    hearing = asyncio.create_task(news.run())
    made = await service.create(uuid4(), "default", requested(), None, META)
    with news.subscribe(made.sandbox.id) as heard:

        async def told_of() -> bool:
            await owner.execute(f"NOTIFY {NEWS_CHANNEL}, 'somebody {made.sandbox.id.hex}'")
            return await heard.wait(0.1)

        await until(told_of)
    hearing.cancel()
    await asyncio.gather(hearing, return_exceptions=True)
    await through.close()


SETTINGS = {
    "search_path": "pg_catalog, sandledger, pg_temp",
    "default_transaction_isolation": "'read committed'",
    "synchronous_commit": "'on'",
    '"TimeZone"': "'UTC'",
    "idle_in_transaction_session_timeout": "'5s'",
}


@pytest.mark.parametrize(("mode", "refused"), [("session", False), ("transaction", True)])
async def test_transaction_mode_is_found_at_the_start(bouncer: Bouncer, login: Any, mode: str, *, refused: bool):
    """The login has all settings, so each single connection looks right."""
    name, database, owner = login
    role = await owner.fetchval("SELECT app_role FROM sandledger.installation")
    for setting, value in {**SETTINGS, "role": f"'{role}'"}.items():
        await owner.execute(f"ALTER ROLE {name} IN DATABASE {database} SET {setting} = {value}")
    pooled = await bouncer.start(mode, IGNORED, name, database)
    for _ in range(5):
        through = Database(pooled)
        with pytest.raises(StoreRefused, match=r"transaction mode.*pool_mode = session") if refused else nullcontext():
            await check_session(through)
        await through.close()


async def test_without_a_pooler_a_connection_keeps_its_session(database: Database):
    for _ in range(5):
        await check_session(database)
