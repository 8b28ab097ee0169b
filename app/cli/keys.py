"""`sandledger keys`: the master key and its rotation.

`--generate` puts one new key into the file for one rotation. A run that was killed may have put it there already, so a
first key that is not fully in use is gone on with. A third key would take the second one out of use at once, and
servers that seal by the second one would be refused until they have read the file again.
"""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.progress import Progress

from app.cli.reporting import Say
from app.cli.session import database, operator
from app.domain.operations import MasterKeyRotated
from app.errors import SettingsError
from app.server.assembly import read_master_keys
from app.service.operations import OperationsLog
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.durable import sync_folder
from app.store.vault.keyfile import NoKeyFile, key_file, prepend_new_key
from app.store.vault.rotation import NOTICE_SECONDS, Rotated, is_due, remaining, rotate, wraps_anything
from app.store.vault.seal import MasterKeys


async def rotate_master(settings: Settings, say: Say, *, generate: bool, notice: float = NOTICE_SECONDS) -> None:
    """Wrap every data key by the first of this machine's master keys, and record it.

    `generate` first puts a new key into the key file, unless one is there that a rotation has yet to bring into use.
    Servers get twice `notice` seconds to seal by the new key.

    Raises:
        SettingsError: there is no master key here, or not the one in use; nothing was changed.
    """
    if generate and settings.sandledger.master_key is not None:
        raise SettingsError("--generate writes a key file; SANDLEDGER_MASTER_KEY is set, so change the variables")
    async with database(settings, say) as opened:
        installation = await read_installation(opened)
        in_use = installation.master_key_id
        keys, source = await _read(settings, in_use)
        log = OperationsLog(opened, installation.id)
        if generate and not await _is_under_way(opened, log, keys, in_use):
            await _generate(settings, keys.ids[0], say)
            keys, source = await _read(settings, in_use)
        say(f"master key in use: {in_use or 'none yet'}; first key in {source}: {keys.ids[0]}")
        if not await is_due(opened, keys.ids[0]):
            say("nothing to do: put a new key first (or use --generate), keep the old one after it")
            return

        async def record(done: Rotated) -> None:
            await log.record(MasterKeyRotated(done.old_key_id, done.new_key_id, done.rewrapped), operator())

        say(f"servers get {2 * notice:.0f} s to seal by the new key, after the first pass")
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("wrapping data keys", total=await remaining(opened, keys.ids[0]) or None)
            done = await rotate(opened, keys, lambda count: bar.update(task, completed=count), record, notice=notice)
        left = await remaining(opened, done.new_key_id)
        say(f"{done.rewrapped} keys are wrapped by {done.new_key_id}; {left} by another key")
        if not left:
            say("The previous key is not needed by this database any more. Take it out of every server's")
            say("configuration and destroy it: every older backup is then unreadable.")


async def _read(settings: Settings, in_use: str | None) -> tuple[MasterKeys, str]:
    try:
        keys, source = await asyncio.to_thread(read_master_keys, settings)
    except NoKeyFile as error:
        if in_use is not None:
            raise error.wanted(in_use) from None
        raise SettingsError(
            f"there is no master key to rotate yet: {error.path} is not there, and nothing in this database is sealed. "
            "`sandledger serve` makes the first key at its first start"
        ) from None
    if settings.sandledger.master_key is None:
        # The process that put the first key there may not have written its folder yet, and it is about to be used.
        path = key_file(settings.sandledger.master_key_file, settings.sandledger.state_dir)
        await asyncio.to_thread(sync_folder, path.resolve().parent)
    return keys, source


async def _is_under_way(opened: Database, log: OperationsLog, keys: MasterKeys, in_use: str | None) -> bool:
    """Whether the first key was put there for a rotation that has not ended.

    A key that stands first although a rotation has replaced it is an old one: going on with it would bring back what
    was to be destroyed.

    Raises:
        SettingsError: the key in use is not here, so no key could be rotated.
    """
    first = keys.ids[0]
    if in_use is None:
        return True
    if in_use not in keys.ids:
        raise SettingsError(
            f"the database is sealed by master key {in_use}, which is not here; put that key into the key file first"
        )
    if first == in_use:
        return await is_due(opened, first)
    return not await wraps_anything(opened, first) and first not in await log.replaced_master_keys()


async def _generate(settings: Settings, first: str, say: Say) -> None:
    path = key_file(settings.sandledger.master_key_file, settings.sandledger.state_dir)
    if await asyncio.to_thread(prepend_new_key, path, before=first):
        say(f"{path}: a new key stands first now")
