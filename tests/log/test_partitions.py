"""Partitions come ahead of need, wait for nobody, and the tail reads only those it must."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest

from app.store.database.pool import Database
from app.store.log.store import TAIL, EventLog
from tests.support.sql import META, connected, insert_event, partitions

SIZE = 25_000_000
MANY = (
    "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
    f"SELECT gen_random_uuid(), 'sandbox', 'default', 1, 'sandbox.paused', 1, '{{}}', '{META}' FROM generate_series(1, $1::int)"
)


async def move_to(owner: Any, position: int) -> None:
    """As if that many had been handed out."""
    await owner.fetchval("SELECT setval('events_position', $1)", position)


async def test_the_present_partition_and_two_ahead_are_there_from_the_start(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn) as app:
        assert await partitions(app) == ["events_p000000", "events_p000001", "events_p000002"]
        assert await bare_log.ensure_partitions() == 0


async def test_each_one_gets_what_the_first_has(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn, owner=True) as owner:
        await move_to(owner, 3 * SIZE)
        assert await bare_log.ensure_partitions() == 3
        rows = await owner.fetch(
            "SELECT c.relname, "
            " (SELECT array_agg(tgname::text ORDER BY tgname) FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal), "
            " (SELECT array_agg(regexp_replace(pg_get_indexdef(indexrelid), 'events_p\\d+', '', 'g') ORDER BY indexrelid::regclass::text) "
            "    FROM pg_index WHERE indrelid = c.oid AND indisvalid), "
            " (SELECT array_agg(conname::text || pg_get_constraintdef(oid) ORDER BY conname) FROM pg_constraint "
            "   WHERE conrelid = c.oid AND contype = 'c'), "
            " c.reloptions, pg_get_userbyid(c.relowner), c.relacl::text "
            "FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE inhparent = 'events'::regclass ORDER BY 1"
        )
    assert [row[0] for row in rows] == [f"events_p{number:06}" for number in range(6)]
    shapes = {tuple(map(str, row[1:])) for row in rows}
    assert len(shapes) == 1, shapes
    triggers, indexes = rows[0][1:3]
    assert triggers == ["announce", "append_only"]
    assert len(indexes) == 3
    assert sum("UNIQUE" in index and "(stream_id, version)" in index for index in indexes) == 1


async def test_the_log_rolls_over_and_an_append_at_the_edge_works(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn, owner=True) as owner, connected(bare_dsn) as app:
        await move_to(owner, SIZE - 3)
        stream = uuid4()
        written = [await insert_event(app, stream, version) for version in range(1, 7)]
        assert written == list(range(SIZE - 2, SIZE + 4))
        assert await owner.fetchval("SELECT count(*) FROM events_p000001") == 4
        assert await bare_log.ensure_partitions() == 1
        assert (await partitions(owner))[-1] == "events_p000003"

    events, position = await bare_log.read_after(SIZE - 3)
    assert [event.position for event in events] == written
    assert position == written[-1]
    assert [event.version for event in await bare_log.history(stream, "default")] == [1, 2, 3, 4, 5, 6]
    assert [event.version for event in await bare_log.history(stream, "default", since=SIZE)] == [4, 5, 6]


async def test_one_statement_may_cross_the_edge(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn, owner=True) as owner, connected(bare_dsn) as app:
        await move_to(owner, SIZE - 50)
        await app.execute(MANY, 100)
    events, _ = await bare_log.read_after(SIZE - 50)
    assert len(events) == 100


async def test_many_at_once_make_each_partition_once(bare_dsn: str):
    async with connected(bare_dsn, owner=True) as owner:
        await move_to(owner, 5 * SIZE)
        logs = [Database(bare_dsn, max_size=1) for _ in range(8)]
        try:
            made = await asyncio.gather(*(EventLog(database).ensure_partitions() for database in logs))
        finally:
            await asyncio.gather(*(database.close() for database in logs))
        assert sum(made) == 3
        assert (await partitions(owner))[-3:] == ["events_p000005", "events_p000006", "events_p000007"]


async def test_a_new_partition_waits_for_no_reader_and_no_writer(bare_dsn: str, bare_log: EventLog):
    """A dump reads for hours. Whoever waited for it would make all appends wait behind itself."""
    async with connected(bare_dsn, owner=True) as owner, connected(bare_dsn) as reader, connected(bare_dsn) as writer:
        await move_to(owner, 2 * SIZE)
        async with reader.transaction(isolation="repeatable_read"), writer.transaction():
            await reader.fetchval("SELECT count(*) FROM events")
            await insert_event(writer)
            async with asyncio.timeout(20):
                assert await bare_log.ensure_partitions() == 2
            await insert_event(writer)


async def test_the_application_decides_neither_number_nor_size(bare_dsn: str):
    async with connected(bare_dsn) as app:
        rows = await app.fetch("SELECT pronargs FROM pg_proc WHERE proname = 'log_ensure_partitions'")
        assert [row[0] for row in rows] == [0]


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in _nodes(child))]


EACH = 4000
ENDS = [part * SIZE + EACH for part in range(4)]
"""Four partitions, each with its first positions used."""


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_the_tail_is_an_index_scan_of_the_partitions_it_needs(bare_dsn: str, mode: str):
    async with connected(bare_dsn, owner=True) as owner:
        for part in range(4):
            await move_to(owner, part * SIZE + 1)
            await owner.fetchval("SELECT log_ensure_partitions()")
            await owner.execute(MANY, EACH)
        await owner.execute("ANALYZE events")
        await owner.execute(f"SET plan_cache_mode = {mode}")
        await owner.execute(f"PREPARE tail (bigint, bigint, int) AS {TAIL.sql}")
        horizon = await owner.fetchval("SELECT log_horizon()")
        cursors = {0: range(4), ENDS[1] - EACH // 2: range(1, 4), ENDS[2] - 10: range(2, 4), horizon - 5: range(3, 4)}
        for after, needed in cursors.items():
            text = await owner.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE tail ({after}, {horizon}, 1000)")
            nodes = _nodes(json.loads(text)[0]["Plan"])
            kinds = {node["Node Type"] for node in nodes}
            assert not kinds & {"Sort", "Incremental Sort", "Seq Scan", "Bitmap Heap Scan", "Merge Append"}, kinds
            scans = [node for node in nodes if "Relation Name" in node]
            assert {node["Node Type"] for node in scans} == {"Index Scan"}
            assert all(node["Index Name"].endswith("_pkey") for node in scans)
            assert [node["Relation Name"] for node in scans] == [f"events_p{part:06}" for part in needed], after


async def test_a_long_stream_reads_in_pages(bare_dsn: str, bare_log: EventLog):
    stream = uuid4()
    async with connected(bare_dsn) as app:
        await app.execute(
            "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
            f"SELECT $1, 'sandbox', 'default', n, 'sandbox.paused', 1, '{{}}', '{META}' FROM generate_series(1, 2500) n",
            stream,
        )
    assert [event.version async for event in bare_log.whole_history(stream, "default")] == list(range(1, 2501))
    assert [event async for event in bare_log.whole_history(stream, "other")] == []
