"""How a command reaches the database, and in whose name it acts.

Commands read and write the database themselves, so they work while no server runs. None of them but `migrate` touches
the schema or makes an embedded database; on a schema of another version, or without a database, they stop and say
what to do.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from app import __version__
from app.cli.reporting import Say
from app.domain.stream import Actor, ActorKind, Meta
from app.server.assembly import check_schema, database_of, open_database
from app.settings import Settings
from app.store.database.pool import Database


@asynccontextmanager
async def database(settings: Settings, say: Say) -> AsyncGenerator[Database]:
    """The application's connections, closed at the end.

    Raises:
        SettingsError, StoreUnavailable: the message says what to do.
    """
    async with open_database(settings, say, upgrade=False) as store:
        check_schema(store)
        opened = database_of(settings, store)
        try:
            yield opened
        finally:
            await opened.close()


def operator() -> Meta:
    """The person at the command line."""
    number = f"uid-{os.getuid()}"
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, e.g. in a container
        name = number
    return Meta(Actor(ActorKind.OPERATOR, number, name), __version__)
