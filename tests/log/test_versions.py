"""Two versions of the code on one schema: the older one reads what it can, erases nothing, and leaves newer streams alone."""

from __future__ import annotations

from uuid import UUID, uuid4

import msgspec
import pytest
from sqlalchemy import Text, Uuid, bindparam, cast, update
from sqlalchemy.dialects.postgresql import JSONB

from app.domain.operations import MasterKeyRotated
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Power
from app.domain.stream import Registry
from app.domain.tenants import ANY_TENANT
from app.errors import UnknownEvent
from app.service.operations import OperationsLog
from app.service.sandboxes import Service
from app.service.streams import decoded, refuse_newer
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import sandboxes
from app.views import current
from app.views.listing import Listing, Wanted
from tests.conftest import INSTALLATION
from tests.log.test_append import traces
from tests.support.sql import connected
from tests.support.stream import META, TENANT, about, requested, seen

JSON_COLUMNS = ("spec", "metadata", "runtime", "address", "waiting", "failure")


@pytest.fixture
def dsn(bare_dsn: str) -> str:
    """Without the check for drift: the rows here hold what this code does not know."""
    return bare_dsn


async def created(service: Service) -> UUID:
    made = await service.create(uuid4(), TENANT, requested(metadata={"a": "b"}), None, META)
    await service.execute(
        made.sandbox.id, ANY_TENANT, about(made.sandbox.id, cmd.RecordSeen(seen(Power.RUNNING))), META
    )
    return made.sandbox.id


async def newer_fields(dsn: str, sandbox_id: UUID) -> None:
    """As a newer version would write each JSON column: with a field more."""
    async with connected(dsn, owner=True) as owner:
        for column in ("spec", "runtime", "address"):
            known = '{"network": "n"}' if column == "address" else "{}"
            await owner.execute(
                f"UPDATE sandboxes SET {column} = coalesce({column}, '{known}') || '{{\"newer\": [1]}}', "
                "version = version + 1 WHERE id = $1",
                sandbox_id,
            )


async def json_columns(dsn: str, sandbox_id: UUID) -> dict[str, str]:
    async with connected(dsn) as connection:
        row = await connection.fetchrow(f"SELECT {', '.join(JSON_COLUMNS)} FROM sandboxes WHERE id = $1", sandbox_id)
        return dict(row)


@pytest.mark.parametrize(
    "command",
    [cmd.PatchMetadata({"c": "d"}), cmd.Pause(), cmd.Terminate(), cmd.RecordRetry("observe", "E", "m", 1)],
    ids=lambda command: type(command).__name__,
)
async def test_what_this_version_does_not_know_survives_what_it_does(dsn: str, service: Service, command: cmd.Command):
    sandbox_id = await created(service)
    await newer_fields(dsn, sandbox_id)
    before = await json_columns(dsn, sandbox_id)
    assert sum("newer" in (value or "") for value in before.values()) == 3
    outcome = await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, command), META)
    assert outcome.events
    after = await json_columns(dsn, sandbox_id)
    changed = {name for name in JSON_COLUMNS if before[name] != after[name]}
    assert changed <= ({"metadata"} if isinstance(command, cmd.PatchMetadata) else set())


async def test_writing_every_column_would_erase_it(dsn: str, service: Service, database: Database):
    """The naive way, as the head row used to be written."""
    sandbox_id = await created(service)
    await newer_fields(dsn, sandbox_id)
    loaded = await service.view.load(sandbox_id, ANY_TENANT)
    assert loaded is not None
    naive = Statement(
        update(sandboxes)
        .where(sandboxes.c.id == bindparam("of", type_=Uuid))
        .values(runtime=cast(bindparam("text", type_=Text), JSONB), version=sandboxes.c.version + 1)
    )
    await database.fetch(naive, of=sandbox_id, text=msgspec.json.encode(loaded[0].runtime).decode())
    assert "newer" not in (await json_columns(dsn, sandbox_id))["runtime"]


async def test_an_engine_in_a_state_of_a_newer_version_takes_nothing_and_stops_nothing(dsn: str, service: Service):
    """One such row would otherwise refuse every create at every older server."""
    assert (await service.create(uuid4(), TENANT, requested(), None, META)).sandbox.engine is not None
    async with connected(dsn, owner=True) as owner:
        assert await owner.execute("UPDATE engines SET state = 'full'") == "UPDATE 1"
    service.engines.forget()
    assert (await service.create(uuid4(), TENANT, requested(), None, META)).sandbox.engine is None


async def raise_schema(dsn: str, table: str, stream_id: UUID) -> None:
    async with connected(dsn, owner=True) as owner:
        await owner.execute(f"UPDATE {table} SET schema = 2, version = version + 1 WHERE id = $1", stream_id)


async def test_nobody_appends_to_a_stream_that_a_newer_version_wrote_to(dsn: str, service: Service):
    sandbox_id = await created(service)
    await raise_schema(dsn, "sandboxes", sandbox_id)
    before = await traces(dsn)
    loaded = await service.view.load(sandbox_id, ANY_TENANT)
    assert loaded is not None
    assert current.is_newer(loaded[0])
    for command in (cmd.PatchMetadata({"c": "d"}), cmd.Pause(), cmd.Terminate()):
        with pytest.raises(UnknownEvent, match="Upgrade this server, or call one that runs the newer version"):
            await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, command), META)
    with pytest.raises(UnknownEvent, match="schema 2, this server reads up to 1"):
        await service.record(loaded[0], cmd.RecordRetry("observe", "E", "m", 1), META)
    assert await traces(dsn) == before


async def test_it_is_still_read(dsn: str, database: Database, service: Service):
    sandbox_id = await created(service)
    await raise_schema(dsn, "sandboxes", sandbox_id)
    page = await Listing(database).page(Wanted(TENANT), size=10)
    assert [sandbox.id for sandbox in page.sandboxes] == [sandbox_id]
    assert len(await service.history(sandbox_id, TENANT)) == 5


async def test_a_newer_event_stops_the_reader_of_its_stream_and_no_other(dsn: str, service: Service):
    mine, other = await created(service), await created(service)
    async with connected(dsn) as newer:
        await newer.execute(
            "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
            "SELECT stream_id, kind, tenant, version + 1, 'sandbox.frozen', 2, '{}', meta FROM events "
            "WHERE stream_id = $1 ORDER BY version DESC LIMIT 1",
            mine,
        )
    with pytest.raises(UnknownEvent, match=r"sandbox.frozen schema 2 was written by a newer version; upgrade"):
        await service.history(mine, TENANT)
    stored = await service.log.history(mine, TENANT)
    assert stored[-1].type == "sandbox.frozen", "as stored bytes it is read by anybody"
    assert len(await service.history(other, TENANT)) == 5


async def test_an_unknown_word_in_the_head_says_what_to_do(dsn: str, service: Service):
    sandbox_id = await created(service)
    async with connected(dsn, owner=True) as owner:
        await owner.execute("UPDATE sandboxes SET desired = 'frozen', version = version + 1 WHERE id = $1", sandbox_id)
    with pytest.raises(UnknownEvent, match=f"{sandbox_id} was written by a newer version"):
        await service.view.load(sandbox_id, ANY_TENANT)


async def test_the_registry_of_an_older_replica_refuses_by_the_number_alone(service: Service):
    """The newer version's registry has revision 2; to the older one it makes no difference which type it was."""
    newer: Registry[ev.Event] = Registry("sandbox", ev.REGISTRY.types, revision=2, schemas={"sandbox.paused": 2})
    event = newer.encode(ev.Paused())
    assert (event.schema, ev.REGISTRY.revision) == (2, 1)
    refuse_newer("sandbox", uuid4(), event.schema, newer)
    with pytest.raises(UnknownEvent):
        refuse_newer("sandbox", uuid4(), event.schema, ev.REGISTRY)
    with pytest.raises(UnknownEvent, match="upgrade this server first"):
        ev.REGISTRY.decode(event.type, event.schema, event.data)


async def test_the_operations_stream_is_left_alone_too(dsn: str, database: Database):
    log = OperationsLog(database, INSTALLATION)
    await log.record(MasterKeyRotated("a", "b", 1), META)
    await raise_schema(dsn, "operations", INSTALLATION)
    with pytest.raises(UnknownEvent, match="Upgrade this server"):
        await log.record(MasterKeyRotated("b", "c", 1), META)


async def test_meta_of_a_newer_version_says_what_to_do(service: Service):
    sandbox_id = await created(service)
    stored = (await service.log.history(sandbox_id, TENANT))[0]
    word = msgspec.structs.replace(stored, meta=stored.meta.replace("api_key", "robot"))
    assert decoded(ev.REGISTRY, word).meta.actor.kind == "robot", "lists of words are open"
    strange = msgspec.structs.replace(stored, meta='{"actor": "robot"}')
    with pytest.raises(UnknownEvent, match="upgrade this server"):
        decoded(ev.REGISTRY, strange)
