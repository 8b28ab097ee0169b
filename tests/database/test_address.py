"""Addresses: what libpq takes is taken, over TLS, over several hosts, in both forms; what is shown hides passwords."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from app.errors import SettingsError, StoreRefused, StoreUnavailable
from app.settings import redacted_dsn
from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.database.statement import Statement
from tests.support.cluster import TcpServer, free_port, tcp_server
from tests.support.tls import Authority, tls_front

SHOWN = Statement(select(func.current_setting("application_name"), func.current_setting("work_mem")))
STANDBY = Statement(select(func.pg_is_in_recovery()))


@pytest.fixture(scope="module")
def server() -> Iterator[TcpServer]:
    """Wants passwords, except of the login `carded`."""
    with tcp_server() as made:
        made.create("host all carded 127.0.0.1/32 trust", "host all all 127.0.0.1/32 scram-sha-256")
        made.start()
        for sql in (
            "CREATE ROLE owner LOGIN CREATEROLE PASSWORD 'p@ss/w?rd #1'",
            "CREATE ROLE carded LOGIN",
            "CREATE DATABASE ledger OWNER owner",
        ):
            made.run("psql", "-XAtq", "-h", made.home / "socket", "-p", str(made.port), "-U", "postgres", "-c", sql)
        yield made


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """What a client has, and what the server has."""
    ours = Authority("ours")
    (tmp_path / "ca.pem").write_bytes(ours.certificate)
    (tmp_path / "other.pem").write_bytes(Authority("theirs").certificate)
    ours.issue("server", tmp_path)
    ours.issue("client", tmp_path)
    return tmp_path


def context(files: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(files / "server.crt", files / "server.key")
    return made


PASSWORD = "p%40ss%2Fw%3Frd%20%231"


async def answer(dsn: str, statement: Statement) -> tuple[Any, ...]:
    database = Database(dsn, connect_timeout=3)
    try:
        return tuple((await database.fetch(statement))[0])
    finally:
        await database.close()


async def test_an_address_of_a_managed_service_works_from_migration_to_statement(server: TcpServer, files: Path):
    async with tls_front(context(files), server.port) as port:
        dsn = (
            f"postgresql://owner:{PASSWORD}@127.0.0.1:{port}/ledger?sslmode=verify-full&sslrootcert={files / 'ca.pem'}"
            "&connect_timeout=4&application_name=mine&options=-c%20work_mem%3D7MB&target_session_attrs=read-write"
            "&channel_binding=prefer&keepalives_idle=30&gssencmode=disable"
        )
        await migrate(dsn, admit=address(f"postgresql://carded@127.0.0.1:{server.port}/ledger"))
        assert await answer(dsn, SHOWN) == ("mine", "7MB")
        words = (
            f"host=127.0.0.1 port={port} user=owner password='p@ss/w?rd #1' dbname = ledger sslmode=require "
            "connect_timeout=4"
        )
        assert await answer(words, SHOWN) == ("sandledger", "4MB")
        (files / "pass").write_text(f"127.0.0.1:{port}:ledger:owner:p@ss/w?rd #1\n")
        (files / "pass").chmod(0o600)
        named = f"postgresql+asyncpg://owner@127.0.0.1:{port}/ledger?passfile={files / 'pass'}"
        assert await answer(named, SHOWN) == ("sandledger", "4MB")
        with pytest.raises(StoreRefused, match="TLS"):
            await answer(dsn.replace("ca.pem", "other.pem"), SHOWN)
        with pytest.raises(StoreRefused, match="password authentication failed") as told:
            await answer(named.replace("owner@", "owner:hunter2@"), SHOWN)
        assert "hunter2" not in str(told.value)
        with pytest.raises(StoreUnavailable):
            await answer(f"{named}&sslmode=disable", SHOWN)


async def test_the_login_of_servers_is_made_with_its_password(server: TcpServer):
    owner = f"postgresql://owner:{PASSWORD}@127.0.0.1:{server.port}/ledger"
    served = f"postgresql://served:{PASSWORD}@127.0.0.1:{server.port}/ledger"
    await migrate(owner, admit=address(served))
    database = Database(served)
    await database.fetch(SHOWN)
    await database.close()
    assert database.login is not None
    assert (database.login.name, database.login.warning) == ("served", None)
    with pytest.raises(StoreRefused, match="password authentication failed"):
        await answer(served.replace("%231", "%232"), SHOWN)
    with pytest.raises(SettingsError, match="ASCII"):
        await migrate(owner, admit=address(f"postgresql://another:h%C3%BCnter2@127.0.0.1:{server.port}/ledger"))


async def test_a_client_certificate(server: TcpServer, files: Path):
    asks = context(files)
    asks.verify_mode = ssl.CERT_REQUIRED
    asks.load_verify_locations(files / "ca.pem")
    await migrate(
        f"postgresql://owner:{PASSWORD}@127.0.0.1:{server.port}/ledger",
        admit=address(f"postgresql://carded@127.0.0.1:{server.port}/ledger"),
    )
    async with tls_front(asks, server.port) as port:
        bare = f"postgresql://carded@127.0.0.1:{port}/ledger?sslmode=verify-ca&sslrootcert={files / 'ca.pem'}"
        with pytest.raises(StoreUnavailable):
            await answer(bare, SHOWN)
        assert await answer(f"{bare}&sslcert={files / 'client.crt'}&sslkey={files / 'client.key'}", SHOWN)


async def test_several_hosts_of_which_the_first_is_dead_and_the_next_a_standby():
    with tcp_server() as primary, tcp_server() as standby:
        primary.create()
        primary.start()
        await migrate(primary.dsn())
        standby.copy(primary)
        standby.start()
        keys = "connect_timeout=2&target_session_attrs"
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
        assert await answer(f"postgresql://postgres@{hosts}/postgres", STANDBY) == (True,)
        assert await answer(f"postgresql://postgres@{hosts}/postgres?{keys}=read-write", STANDBY) == (False,)
        with socket.socket() as mute:
            # It accepts and says nothing. With one limit for all hosts nobody would come to the second.
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            behind = f"127.0.0.1:{mute.getsockname()[1]},127.0.0.1:{primary.port}"
            assert await answer(f"postgresql://postgres@{behind}/postgres?connect_timeout=1", STANDBY) == (False,)
        turned = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        assert await answer(f"postgresql://postgres@{turned}/postgres?{keys}=prefer-standby", STANDBY) == (True,)
        # The driver asks a host that lets nobody in like one that is dead: it goes on to the next.
        standby.stop()
        assert await answer(f"postgresql://postgres@{hosts}/postgres", STANDBY) == (False,)
        with pytest.raises(StoreUnavailable, match="target_session_attrs"):
            await answer(f"postgresql://postgres@{hosts}/postgres?{keys}=standby", STANDBY)


WRONG = [
    "postgresql://u:hunter2/x@h/d",
    "postgresql://u:hunter2#x@h/d",
    "postgresql://u:hunter2@h:port/d",
    "postgresql://u:x@hunter2@h/d",
    "postgresql://u:p@h/d?hunter2",
    "postgresql://u:p@h/d?nonsense=hunter2",
    "postgresql://u:p@h/d?connect_timeout=hunter2",
    "postgresql://u:p@h/d?sslrootcert=/hunter2",
    "postgresql://u:hunter2@h/d?channel_binding=require",
    "postgresql://u:hunter2@h/d?sslrootcert=system&sslmode=require",
    "mysql://u:hunter2@h/d",
    "host=h password='hunter2",
    "host=h hunter2",
    "",
]


@pytest.mark.parametrize("dsn", WRONG)
def test_what_is_no_address_is_said_in_one_line_without_any_value(dsn: str):
    with pytest.raises(SettingsError) as told:
        address(dsn)
    assert "hunter2" not in str(told.value)


async def test_a_value_that_the_driver_does_not_take_is_a_setting_to_correct():
    database = Database("postgresql://u:hunter2@127.0.0.1:1/d?sslmode=perhaps")
    with pytest.raises(SettingsError) as told:
        await database.fetch(STANDBY)
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://u:pw@h:1,i:2/d?sslmode=require", "postgresql://u:***@h:1,i:2/d?sslmode=require"),
        ("postgresql://h/d?user=u&password=pw&sslpassword=pw", "postgresql://h/d?user=u&password=***&sslpassword=***"),
        ("postgresql://u@h/d?options=-c%20x%3Dpw", "postgresql://u@h/d?options=***"),
        (r"host=h  password = 'pw \' pw' dbname=d", "host=h password=*** dbname=d"),
        ("host=h passwrod=pw", "host=h passwrod=***"),
        ("host=h password=p w", "***"),
    ],
)
def test_what_is_shown_hides_passwords_in_every_form(dsn: str, shown: str):
    assert redacted_dsn(dsn) == shown


def test_the_certificates_of_this_machine_verify_the_name():
    tls = address("postgresql://u@h/d?sslrootcert=system").tls
    assert tls is not None
    assert (tls.verify_mode, tls.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_a_name_and_a_port_for_each_host():
    assert address("postgresql://u@[::1]:1,b,/d").hosts == (
        "postgresql://?host=%5B%3A%3A1%5D&port=1&user=u&dbname=d",
        "postgresql://?host=b&port=5432&user=u&dbname=d",
    )
    assert address("host=/run/a,b port=7 user=u").hosts == (
        "postgresql://?host=%2Frun%2Fa&port=7&user=u",
        "postgresql://?host=b&port=7&user=u",
    )
