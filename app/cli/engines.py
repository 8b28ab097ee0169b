"""`sandledger engines`: which engines the log knows, and the two ways out of a mismatch.

**Restoring a mark.** A worker never makes a mark for an engine that the log knows: an engine without it may be another
one, where every sandbox of the log would be found missing. A person can know better, and one of these proves it:

* an object on the engine bears the engine's own id that the log has of it, which no other engine can show;
* the log has no object there, and the engine calls itself by the same id as before.

Without proof the command refuses, and `--force` takes the person's word. What would make the mark fail is looked at
before. Then the event comes first and the mark after it: whatever dies in between, no mark is there that nobody
accounts for, and the command can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from app.cli.reporting import Say, console, plain, print_json, table
from app.cli.session import database, operator
from app.domain.engine.decide import RestoreMark, Sighting, agrees
from app.domain.engine.events import MARK_ABSENT
from app.domain.engine.state import Engine
from app.domain.sandbox.state import RuntimeState
from app.errors import SettingsError
from app.runtime.driver import Driver, EngineInfo, Misnamed, Observed
from app.server.assembly import MakeDriver, docker_driver
from app.service.engines import Engines
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.views.differences import open_sandboxes
from app.views.engines import EnginesView
from app.views.overview import EngineLine, OverviewReader


async def show(settings: Settings, say: Say, *, as_json: bool) -> None:
    """Print every engine that the log knows, as a table or as one JSON array."""
    async with database(settings, say) as opened:
        lines = await OverviewReader(opened).engines()
    if as_json:
        print_json(lines)
    else:
        console().print(drawn(lines))


def drawn(lines: Iterable[EngineLine]) -> Table:
    """Engines, one a row; `sandledger status` shows the same."""
    headings = ("engine", "kind", "version", "state", "since (UTC)", "sandboxes", "seen", "swept", "trouble")
    made = table(*headings, title="Engines")
    for line in lines:
        made.add_row(
            plain(line.name),
            plain(line.kind),
            plain(line.version),
            plain(line.state, "" if line.state == "up" else "red"),
            f"{line.state_since:%Y-%m-%d %H:%M:%S}",
            str(line.sandboxes),
            _ago(line.seen_s),
            _ago(line.swept_s),
            plain(line.trouble),
        )
    return made


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s ago"


async def trust(settings: Settings, name: str, say: Say) -> None:
    """Follow this log from here on, although the engine holds objects from beyond its end."""
    async with database(settings, say) as opened:
        installation = (await read_installation(opened)).id
        engines = Engines(opened, Signal(opened), installation, EnginesView(opened))
        engine = await engines.trust(name, operator())
    say(
        f"engine {name} is {engine.state} again. Its objects that belong to no sandbox of this log are orphans now; "
        "workers remove them after two sweeps"
    )


async def restore_mark(
    settings: Settings, name: str, say: Say, *, force: bool, make_driver: MakeDriver = docker_driver
) -> None:
    """Make the mark again on an engine that has lost it.

    Raises:
        SettingsError: it is not lost, another mark is there, or nothing proves that it is the engine of the log.
    """
    async with database(settings, say) as opened:
        installation = (await read_installation(opened)).id
        engines = Engines(opened, Signal(opened), installation, EnginesView(opened))
        engine = await engines.load(name)
        if engine is None:
            raise SettingsError(f"no engine named {name} is registered; `sandledger engines ls` shows the names")
        driver = make_driver(settings, installation)
        try:
            if driver.name != name:
                raise SettingsError(f"these settings lead to engine {driver.name}; use those of a worker of {name}")
            info = await driver.check()
            if (why := agrees(engine, _sighting(name, info))) is None:
                say(f"engine {name} has its mark; there is nothing to do")
                return
            if why != MARK_ABSENT:
                raise SettingsError(
                    f"the engine at {info.address} bears another mark ({info.mark}) than engine {name} "
                    f"({engine.mark}). If it is another engine, correct the address. If it is the same one and its "
                    "mark was made again, remove that volume (`docker volume ls` shows sandledger-mark-...) and run "
                    "this again"
                )
            if info.name_taken is not None:
                raise SettingsError(
                    f"the engine at {info.address} has a volume {info.name_taken} that is not ours, in the place of "
                    f"the mark. Remove it (`docker volume rm {info.name_taken}`) and run this again"
                )
            expected, found = await _compare(opened, driver, name)
            if not force:
                _demand_proof(engine, info, expected, found)
            await engines.execute(name, RestoreMark(expected, found), operator())
            made = (await driver.prepare(engine.mark)).mark
            if made != engine.mark:
                raise SettingsError(f"another mark ({made}) was made at the same moment; run this again")
        finally:
            await driver.close()
    say(
        f"engine {name} at {info.address} has its mark again ({found} of {expected} objects of the log were found "
        "there). Workers go on within seconds"
    )


def _sighting(name: str, info: EngineInfo) -> Sighting:
    return Sighting(name, info.kind, info.engine_id, info.mark, info.version, info.api)


async def _compare(opened: Database, driver: Driver, name: str) -> tuple[int, int]:
    """How many objects the log has on the engine, and how many of them the engine shows under the same id."""
    shown: set[str] = set()
    async for one in driver.inventory():
        observed = one.observed if isinstance(one, Misnamed) else one
        if isinstance(observed, Observed) and observed.main is not None:
            shown.add(observed.main.runtime_id)
    known = [
        sandbox.runtime_id
        async for sandbox in open_sandboxes(opened, name)
        if sandbox.runtime_id is not None and sandbox.observed not in (RuntimeState.LOST, RuntimeState.REMOVED)
    ]
    return len(known), sum(runtime_id in shown for runtime_id in known)


def _demand_proof(engine: Engine, info: EngineInfo, expected: int, found: int) -> None:
    if found or (expected == 0 and info.engine_id == engine.engine_id):
        return
    if expected == 0:
        raise SettingsError(
            f"the log has no object on engine {engine.name} that could prove it, and the engine at {info.address} "
            f"calls itself {info.engine_id}, not {engine.engine_id}. If you know that it is the same one, add --force"
        )
    raise SettingsError(
        f"none of the {expected} objects that the log has on engine {engine.name} is on the engine at {info.address}, "
        "so it seems to be another one. With --force the mark is made all the same; workers then record these "
        "sandboxes as lost"
    )
