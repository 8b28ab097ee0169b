"""`sandledger links`: signed links of a sandbox, for a person with a browser.

As all commands do, these read and write the database themselves. A link needs the installation's key, so the master key
has to be on this machine, as on a server. A revocation is told to all servers at once, because they cut streams then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

import click

from app.cli.reporting import Say
from app.cli.session import database, operator
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.endpoints import Asked, link_url
from app.domain.sandbox.links import milliseconds, present
from app.domain.tenants import ANY_TENANT
from app.server.assembly import link_key
from app.server.network import network_of
from app.service.sandboxes import Service
from app.settings import Settings
from app.store.database.pool import Database
from app.store.log.signal import Signal


async def create(settings: Settings, sandbox_id: UUID, port: int, seconds: int, say: Say) -> None:
    """Print the address of a new link.

    Raises:
        Rejected: there is no such sandbox, it does not run, or no link may lead to this port.
        SettingsError: there is no master key here, or not the one in use.
    """
    async with database(settings, say) as opened, _service(opened) as service:
        key = await link_key(settings, opened)
        outcome = await service.execute(sandbox_id, ANY_TENANT, cmd.CreateLink(port, seconds), operator())
    sandbox, (made,) = outcome.sandbox, outcome.events
    assert isinstance(made, ev.LinkCreated)
    link = present(sandbox, port, milliseconds(made.expires_at))
    network = network_of(settings, os.environ)
    host = network.outbound if settings.server.host in ("0.0.0.0", "::") else settings.server.host  # noqa: S104
    at = f"[{host}]" if ":" in host else host
    asked = Asked(port, True, f"{at}:{settings.server.port}", "/v1")
    say(f"link {made.link_id} to port {port} of sandbox {sandbox.id}, until {made.expires_at:%Y-%m-%d %H:%M:%S} UTC")
    click.echo(link_url(sandbox, asked, network, key.sign(link)))


async def revoke(settings: Settings, sandbox_id: UUID, say: Say) -> None:
    """End all links of a sandbox.

    Raises:
        Rejected: there is no such sandbox.
    """
    async with database(settings, say) as opened, _service(opened) as service:
        await service.execute(sandbox_id, ANY_TENANT, cmd.RevokeLinks(), operator())
    say(f"no link to sandbox {sandbox_id} that was made before holds any more; streams are cut within two seconds")


@asynccontextmanager
async def _service(opened: Database) -> AsyncGenerator[Service]:
    """The write path. What was written is told to servers before this ends."""
    signal = Signal(opened)
    telling = asyncio.create_task(signal.run())
    try:
        yield Service(opened, signal)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
