"""`sandledger keys`: the master key and its rotation."""

from __future__ import annotations

import asyncio
import getpass
import os
from pathlib import Path

from rich.progress import Progress

from app import __version__
from app.cli.reporting import Say
from app.domain.operations import MasterKeyRotated
from app.domain.stream import Actor, ActorKind, Meta
from app.errors import SettingsError
from app.server.assembly import open_database
from app.service.operations import OperationsLog
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.vault.keyfile import master_keys, prepend_new_key
from app.store.vault.rotation import NOTICE_SECONDS, Rotated, is_due, remaining, rotate


async def rotate_master(settings: Settings, say: Say, *, generate: bool, notice: float = NOTICE_SECONDS) -> None:
    """Wrap every data key by the first of this machine's master keys, and record it."""
    ours = settings.sandledger
    if generate:
        await asyncio.to_thread(_generate, ours.master_key, ours.master_key_file, ours.state_dir, say)
    keys, source = await asyncio.to_thread(
        master_keys, ours.master_key, ours.previous_master_key, ours.master_key_file, ours.state_dir
    )
    async with open_database(settings, say) as store:
        database = Database(store.dsn)
        try:
            installation = await read_installation(database)
            in_use = installation.master_key_id
            say(f"master key in use: {in_use or 'none yet'}; first key in {source}: {keys.ids[0]}")
            if not await is_due(database, keys.ids[0]):
                say("nothing to do: put a new key first (or use --generate), keep the old one after it")
                return
            log = OperationsLog(database, installation.id)

            async def record(done: Rotated) -> None:
                await log.record(MasterKeyRotated(done.old_key_id, done.new_key_id, done.rewrapped), _meta())

            say(f"servers get {2 * notice:.0f} s to seal by the new key, after the first pass")
            with Progress() as bar:
                task = bar.add_task("wrapping data keys", total=await remaining(database, keys.ids[0]) or None)
                done = await rotate(
                    database, keys, lambda count: bar.update(task, completed=count), record, notice=notice
                )
            left = await remaining(database, done.new_key_id)
            say(f"{done.rewrapped} keys are wrapped by {done.new_key_id}; {left} by another key")
            if not left:
                say("The previous key is not needed by this database any more. Take it out of every server's")
                say("configuration and destroy it: every older backup is then unreadable.")
        finally:
            await database.close()


def _generate(in_environment: bytes | None, configured: Path | None, state_dir: Path, say: Say) -> None:
    if in_environment is not None:
        raise SettingsError("--generate writes a key file; SANDLEDGER_MASTER_KEY is set, so change the variables")
    path = configured or state_dir / "master.key"
    if not path.exists():
        raise SettingsError(f"{path}: there is no master key to rotate yet")
    prepend_new_key(path)
    say(f"{path}: a new key stands first now")


def _meta() -> Meta:
    """The person at the command line."""
    return Meta(Actor(ActorKind.OPERATOR, f"uid-{os.getuid()}", getpass.getuser()), __version__)
