"""Rotation of the master key: online, resumable, exact about what the old key still opens, and silent about the rest."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.errors import KeyRetired, SettingsError
from app.service.sandboxes import Service
from app.store.database.installation import claim_master_key, read_installation
from app.store.database.pool import Database
from app.store.vault.keyfile import master_keys, prepend_new_key
from app.store.vault.keys import NAMES, open_keys, other_master_keys
from app.store.vault.rotation import BATCH_ROWS, Rotated, follow_master_key, is_due, remaining, rotate
from app.store.vault.seal import MasterKeys, Sealed, Sealer, Secrets, Unsealable
from tests.support.sql import connected
from tests.support.stream import META, TENANT, requested

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
OLD, NEW, OTHER = (bytes([number]) * 32 for number in (1, 2, 3))
BEFORE, BOTH, AFTER = MasterKeys(OLD), MasterKeys(NEW, OLD), MasterKeys(NEW)
OLD_ID, NEW_ID = BEFORE.ids[0], AFTER.ids[0]
VALUES = Secrets({"TOKEN": "hunter2"})
MANY = BATCH_ROWS + 300


def silent(_: int) -> None:
    pass


async def nothing(_: Rotated) -> None:
    pass


@pytest.fixture
async def installed(database: Database) -> Database:
    """An installation whose values the old key seals."""
    found = await claim_master_key(database, BEFORE.ids)
    assert found.master_key_id == OLD_ID
    await open_keys(database, BEFORE, OLD_ID)
    return database


async def create(service: Service, sealer: Sealer) -> UUID:
    sandbox_id = uuid4()
    await service.create(sandbox_id, TENANT, requested(), sealer.seal(sandbox_id, VALUES), META)
    return sandbox_id


async def stored(dsn: str) -> dict[UUID, Sealed]:
    async with connected(dsn) as connection:
        rows = await connection.fetch("SELECT stream_id, key_id, wrapped_key, sealed FROM sealed_values")
        return {UUID(int=row[0].int): Sealed(*row[1:]) for row in rows}


async def fill(dsn: str, service: Service, sealer: Sealer, count: int) -> None:
    """Rows beside a real one, to have more than one batch. They belong to no sandbox and go before the test ends."""
    await create(service, sealer)
    ids = [uuid4() for _ in range(count)]
    rows = [(one, *msgspec.structs.astuple(sealer.seal(one, VALUES))) for one in ids]
    async with connected(dsn) as connection:
        await connection.executemany(
            "INSERT INTO sealed_values VALUES ($1, 'sandbox', 'default', $2, $3, $4, clock_timestamp())", rows
        )


async def unfill(dsn: str) -> None:
    async with connected(dsn) as connection:
        await connection.execute("DELETE FROM sealed_values WHERE stream_id NOT IN (SELECT id FROM sandboxes)")


async def test_afterwards_the_new_key_alone_opens_everything_and_the_old_one_nothing(
    dsn: str, installed: Database, service: Service
):
    before_keys = await open_keys(installed, BEFORE, OLD_ID)
    await fill(dsn, service, Sealer(BEFORE, key_id=OLD_ID), MANY)
    counts: list[int] = []
    done = await rotate(installed, BOTH, counts.append, nothing, notice=0)
    assert (done.old_key_id, done.new_key_id, done.rewrapped) == (OLD_ID, NEW_ID, MANY + 1 + len(NAMES))
    assert counts == sorted(counts)
    assert len(counts) > 1
    assert not await is_due(installed, NEW_ID)
    new, old = Sealer(AFTER), Sealer(BEFORE)
    for stream_id, sealed in (await stored(dsn)).items():
        assert new.unseal(stream_id, sealed) == VALUES
        with pytest.raises(Unsealable, match=NEW_ID):
            old.unseal(stream_id, sealed)
    assert (await read_installation(installed)).master_key_id == NEW_ID
    # Digests, fingerprints, tokens and links stay: the keys behind them are the same ones.
    after_keys = await open_keys(installed, AFTER, NEW_ID)
    assert msgspec.structs.astuple(after_keys) == msgspec.structs.astuple(before_keys)
    one = Sealer(BEFORE, before_keys.digest), Sealer(AFTER, after_keys.digest)
    assert len({sealer.digest(b"value", "env") for sealer in one}) == 1
    with pytest.raises(SettingsError, match="do not open"):
        await open_keys(installed, BEFORE, OLD_ID)
    await unfill(dsn)


async def test_an_older_backup_opens_with_the_old_key_only(dsn: str, installed: Database, service: Service):
    """What is promised: destroy the old key, and older backups are unreadable. Before that they are not."""
    sandbox_id = await create(service, Sealer(BEFORE))
    backup = (await stored(dsn))[sandbox_id]
    await service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), META)
    assert await stored(dsn) == {}
    assert Sealer(BEFORE).unseal(sandbox_id, backup) == VALUES, "an erased row is in the backup all the same"
    await rotate(installed, BOTH, silent, nothing, notice=0)
    assert Sealer(BOTH).unseal(sandbox_id, backup) == VALUES, "as long as the old key exists"
    with pytest.raises(Unsealable, match=OLD_ID):
        Sealer(AFTER).unseal(sandbox_id, backup)


async def test_creates_go_on_while_it_runs(dsn: str, installed: Database, service: Service):
    sealer = Sealer(BOTH, key_id=OLD_ID)
    await fill(dsn, service, sealer, MANY)
    following = asyncio.create_task(follow_master_key(installed, sealer, every=0.05))
    ended = asyncio.Event()
    made: list[UUID] = []

    async def go_on() -> None:
        while not ended.is_set():
            made.append(await create(service, sealer))

    creating = [asyncio.create_task(go_on()) for _ in range(4)]
    try:
        await rotate(installed, BOTH, silent, nothing, notice=0.5)
    finally:
        ended.set()
        outcomes = await asyncio.gather(*creating, return_exceptions=True)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert outcomes == [None] * 4, "no create was refused"
    assert len(made) > 20
    rows = await stored(dsn)
    assert {rows[stream_id].key_id for stream_id in made} == {NEW_ID}
    assert all(Sealer(AFTER).unseal(stream_id, rows[stream_id]) == VALUES for stream_id in made)
    await unfill(dsn)


async def test_a_rotation_that_was_killed_goes_on(dsn: str, installed: Database, service: Service):
    await fill(dsn, service, Sealer(BEFORE), MANY)

    class Killed(Exception):
        pass

    def die(_: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        await rotate(installed, BOTH, die, nothing, notice=0)
    rows = await stored(dsn)
    assert {sealed.key_id for sealed in rows.values()} == {OLD_ID, NEW_ID}
    assert all(Sealer(BOTH).unseal(stream_id, sealed) == VALUES for stream_id, sealed in rows.items())
    assert await other_master_keys(installed, NEW_ID) == [OLD_ID] * len(NAMES)
    await rotate(installed, BOTH, silent, nothing, notice=0)
    assert not await is_due(installed, NEW_ID)
    again = await rotate(installed, BOTH, silent, nothing, notice=0)
    assert again.rewrapped == 0
    await unfill(dsn)


async def test_a_kill_around_the_record_leaves_none_out(installed: Database):
    """Killed before or after it is recorded: the next run records it, with the key that was replaced."""
    recorded: list[Rotated] = []

    class Killed(Exception):
        pass

    for moment in ("before", "after"):

        async def record(done: Rotated, moment: str = moment) -> None:
            if moment == "after":
                recorded.append(done)
            raise Killed

        with pytest.raises(Killed):
            await rotate(installed, BOTH, silent, record, notice=0)
        assert await is_due(installed, NEW_ID)

    async def keep(done: Rotated) -> None:
        recorded.append(done)

    await rotate(installed, BOTH, silent, keep, notice=0)
    assert [(done.old_key_id, done.new_key_id) for done in recorded] == [(OLD_ID, NEW_ID)] * 2
    await rotate(installed, BOTH, silent, keep, notice=0)
    assert len(recorded) == 2, "nothing was rotated, nothing is recorded"


async def test_each_old_key_is_recorded(dsn: str, installed: Database, until: Until):
    """A rotation is killed while it wraps the keys of the installation; two keys wrap them when the next one begins."""
    third = MasterKeys(OTHER, NEW, OLD)
    recorded: list[Rotated] = []

    async def keep(done: Rotated) -> None:
        recorded.append(done)

    async def are_mixed() -> bool:
        return set(await other_master_keys(installed, third.ids[0])) == {OLD_ID, NEW_ID}

    async with connected(dsn, owner=True) as holder, holder.transaction():
        last = await holder.fetchval("SELECT name FROM installation_keys ORDER BY ctid DESC LIMIT 1")
        await holder.execute("SELECT FROM installation_keys WHERE name = $1 FOR UPDATE", last)
        killed = asyncio.create_task(rotate(installed, BOTH, silent, nothing, notice=0))
        await until(are_mixed)
        killed.cancel()
        await asyncio.gather(killed, return_exceptions=True)
        # A request to cancel may come late: its statement must not get the row when this lock goes.
        await holder.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE NOT granted")
    await rotate(installed, third, silent, keep, notice=0)
    assert {(one.old_key_id, one.new_key_id) for one in recorded} == {(old, third.ids[0]) for old in (OLD_ID, NEW_ID)}
    assert (len(recorded), sum(one.rewrapped for one in recorded)) == (2, len(NAMES))


async def test_a_key_that_wrapped_only_data_keys_is_recorded_too(installed: Database):
    """A rotation is killed between its first pass and its record: its key is in use, and wraps no installation key."""
    third = MasterKeys(OTHER, NEW, OLD)
    recorded: list[str] = []

    class Killed(Exception):
        pass

    async def die(_: Rotated) -> None:
        raise Killed

    async def keep(done: Rotated) -> None:
        recorded.append(done.old_key_id)

    with pytest.raises(Killed):
        await rotate(installed, BOTH, silent, die, notice=0)
    await rotate(installed, third, silent, keep, notice=0)
    assert sorted(recorded) == sorted([OLD_ID, NEW_ID])


async def test_two_rotations_at_once_share_the_work(dsn: str, installed: Database, service: Service):
    await fill(dsn, service, Sealer(BEFORE), MANY)
    others = [Database(dsn, max_size=2) for _ in range(3)]
    try:
        done = await asyncio.gather(*(rotate(one, BOTH, silent, nothing, notice=0) for one in (installed, *others)))
    finally:
        for one in others:
            await one.close()
    assert sum(one.rewrapped for one in done) >= MANY + 1
    assert not await is_due(installed, NEW_ID)
    rows = await stored(dsn)
    assert all(Sealer(AFTER).unseal(stream_id, sealed) == VALUES for stream_id, sealed in rows.items())
    await unfill(dsn)


async def test_of_two_rotations_to_different_keys_one_stops(dsn: str, installed: Database, service: Service):
    sandbox_id = await create(service, Sealer(BEFORE))
    third = MasterKeys(OTHER, OLD)
    outcomes = await asyncio.gather(
        rotate(installed, BOTH, silent, nothing, notice=0.1),
        rotate(installed, third, silent, nothing, notice=0.1),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, SettingsError)]
    assert len(refused) == 1
    in_use = (await read_installation(installed)).master_key_id
    sealed = (await stored(dsn))[sandbox_id]
    assert sealed.key_id == in_use
    assert Sealer(AFTER if in_use == NEW_ID else MasterKeys(OTHER)).unseal(sandbox_id, sealed) == VALUES


async def test_without_the_key_in_use_nothing_is_rotated(dsn: str, installed: Database, service: Service):
    await create(service, Sealer(BEFORE))
    before = await stored(dsn)
    with pytest.raises(SettingsError, match=f"{OLD_ID}, which is not here"):
        await rotate(installed, AFTER, silent, nothing, notice=0)
    assert await stored(dsn) == before
    assert (await read_installation(installed)).master_key_id == OLD_ID


async def test_a_server_without_the_new_key_does_not_start(installed: Database):
    await rotate(installed, BOTH, silent, nothing, notice=0)
    with pytest.raises(SettingsError, match=NEW_ID):
        await claim_master_key(installed, BEFORE.ids)


async def test_a_server_that_has_not_noticed_cannot_seal_by_the_old_key_once_it_is_out_of_use(
    dsn: str, installed: Database, service: Service
):
    late = Sealer(BEFORE)
    await create(service, late)
    await rotate(installed, BOTH, silent, nothing, notice=0)
    async with connected(dsn) as connection:
        events = await connection.fetchval("SELECT count(*) FROM events")
        with pytest.raises(KeyRetired, match=f"{OLD_ID} is not in use any more; repeat"):
            await create(service, late)
        assert await connection.fetchval("SELECT count(*) FROM events") == events
    assert await remaining(installed, NEW_ID) == 0
    await service.create(uuid4(), TENANT, requested(), None, META)  # nothing to seal, nothing to refuse
    with pytest.raises(SettingsError, match="does not have"):
        late.use(NEW_ID)

    # The naive way, without the trigger: the row is there after the last pass, and lost with the old key.
    async with connected(dsn, owner=True) as owner:
        await owner.execute("ALTER TABLE sealed_values DISABLE TRIGGER check_master_key")
    sandbox_id = await create(service, late)
    assert await remaining(installed, NEW_ID) == 1
    with pytest.raises(Unsealable):
        Sealer(AFTER).unseal(sandbox_id, (await stored(dsn))[sandbox_id])


async def test_whoever_was_checked_before_the_end_is_waited_for(
    dsn: str, installed: Database, service: Service, until: Until
):
    """An append that was accepted under the old key and has not committed: the last pass must see it."""
    stream_id = uuid4()
    sealed = Sealer(BEFORE).seal(stream_id, VALUES)
    async with connected(dsn) as slow, connected(dsn, owner=True) as watcher:
        await slow.execute("BEGIN")
        await slow.execute(
            "INSERT INTO sealed_values VALUES ($1, 'sandbox', 'default', $2, $3, $4, clock_timestamp())",
            stream_id,
            *msgspec.structs.astuple(sealed),
        )
        rotating = asyncio.create_task(rotate(installed, BOTH, silent, nothing, notice=0))

        async def waits() -> bool:
            return bool(
                await watcher.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND wait_event = 'advisory'"
                )
            )

        await until(waits)
        assert not rotating.done()
        await slow.execute("COMMIT")
        await rotating
    assert await remaining(installed, NEW_ID) == 0
    assert Sealer(AFTER).unseal(stream_id, (await stored(dsn))[stream_id]) == VALUES
    await unfill(dsn)


async def test_erasure_and_rotation_meet(dsn: str, installed: Database, service: Service):
    """A row that is erased while it is being wrapped again does not come back."""
    sealer = Sealer(BEFORE)
    ids = [await create(service, sealer) for _ in range(12)]
    await asyncio.gather(
        rotate(installed, BOTH, silent, nothing, notice=0),
        *(service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), META) for sandbox_id in ids[:6]),
    )
    assert set(await stored(dsn)) == set(ids[6:])


async def test_a_server_follows(installed: Database, until: Until, caplog: pytest.LogCaptureFixture):
    knows, lacks = Sealer(BOTH, key_id=OLD_ID), Sealer(BEFORE, reread=lambda: BEFORE)
    following = [asyncio.create_task(follow_master_key(installed, sealer, every=0.02)) for sealer in (knows, lacks)]
    await rotate(installed, BOTH, silent, nothing, notice=0)

    async def noticed() -> bool:
        return knows.key_id == NEW_ID and "which this server does not have" in caplog.text

    await until(noticed)
    assert lacks.key_id == OLD_ID
    assert not any(task.done() for task in following)
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)


async def test_a_running_server_reads_the_key_that_was_put_into_its_file(
    dsn: str, installed: Database, service: Service, until: Until, tmp_path: Path
):
    """`rotate-master --generate` beside a server that runs. Without a second look it would refuse every secret."""
    path = tmp_path / "key"
    path.write_text(base64.b64encode(OLD).decode())

    def reread() -> MasterKeys:
        return master_keys(None, None, path, tmp_path)[0]

    sealer = Sealer(OLD, reread=reread)
    before = await create(service, sealer)
    following = asyncio.create_task(follow_master_key(installed, sealer, every=0.02))
    assert prepend_new_key(path, before=OLD_ID)
    generated = reread().ids[0]

    async def followed(_: Rotated) -> None:
        async def noticed() -> bool:
            return sealer.key_id == generated

        await until(noticed)

    await rotate(installed, reread(), silent, followed, notice=0)
    made = await create(service, sealer)
    rows = await stored(dsn)
    assert {row.key_id for row in rows.values()} == {generated}
    assert all(sealer.unseal(one, rows[one]) == VALUES for one in (before, made))
    assert not following.done()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_servers_that_start_at_once_make_one_set_of_keys(dsn: str, database: Database):
    await claim_master_key(database, BEFORE.ids)
    others = [Database(dsn, max_size=1) for _ in range(6)]
    try:
        found = await asyncio.gather(*(open_keys(one, BEFORE, OLD_ID) for one in others))
    finally:
        for one in others:
            await one.close()
    assert len({msgspec.structs.astuple(keys) for keys in found}) == 1
    keys = found[0]
    assert len({keys.digest, keys.token, keys.link, keys.audit}) == 4
    assert all(len(key) == 32 for key in msgspec.structs.astuple(keys))
    assert keys.digest not in repr(keys).encode()


async def test_a_wrapped_key_under_another_name_does_not_open(dsn: str, installed: Database):
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "UPDATE installation_keys SET wrapped = (SELECT wrapped FROM installation_keys WHERE name = 'token') "
            "WHERE name = 'digest'"
        )
    with pytest.raises(SettingsError):
        await open_keys(installed, BEFORE, OLD_ID)


async def test_nothing_of_a_key_is_stored_in_the_clear(dsn: str, installed: Database):
    keys = await open_keys(installed, BEFORE, OLD_ID)
    clear = [OLD, *msgspec.structs.astuple(keys)]
    async with connected(dsn, owner=True) as owner:
        for table in ("installation", "installation_keys"):
            for row in await owner.fetch(f"SELECT * FROM {table}"):
                values = [value if isinstance(value, bytes) else str(value).encode() for value in row]
                assert not [key for key in clear for value in values if key in value or key.hex().encode() in value]


async def test_the_application_can_change_no_sealed_value(dsn: str, installed: Database, service: Service):
    await create(service, Sealer(BEFORE))
    async with connected(dsn) as app:
        for column in ("sealed = 'x'", "stream_id = gen_random_uuid()", "tenant = 'x'", "sealed_at = now()"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await app.execute(f"UPDATE sealed_values SET {column}")


def test_the_random_parts_are_random():
    one, two = Sealer(os.urandom(32)), Sealer(os.urandom(32))
    assert one.digest(b"x", "env") != two.digest(b"x", "env")
