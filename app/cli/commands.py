"""The commands. Each loads settings, runs one coroutine, and turns our errors into one line and an exit code."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
import uvloop

from app import __version__
from app.cli import doctor, logs, status, timeline
from app.cli import engines as engine_commands
from app.cli import keys as key_commands
from app.cli import links as link_commands
from app.cli import nginx as nginx_commands
from app.cli.demonstration.play import play
from app.cli.reporting import say
from app.domain.sandbox.endpoints import MAX_PORT
from app.domain.sandbox.links import LONGEST_SECONDS
from app.errors import SandledgerError
from app.server.assembly import open_database
from app.server.process import Role, run
from app.settings import Settings, load

T = TypeVar("T")
_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file; else SANDBOX_CONFIG_PATH, else ~/.sandbox.toml, else defaults.",
)


def settings_of(config: Path | None) -> Settings:
    """Load, and print each warning."""
    loaded = load(config, os.environ)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    return loaded.settings


def go(work: Callable[[], Coroutine[Any, Any, T]], *, loop: str = "auto") -> T:
    """Run to the end; our own errors become one line on standard error and exit code 1."""
    try:
        if loop == "asyncio":
            return asyncio.run(work())
        return uvloop.run(work())
    except* SandledgerError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        say(f"error: {error}")
        sys.exit(1)


class Commands(click.Group):
    """Shows our errors as lines also when they come before a command runs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except SandledgerError as error:
            say(f"error: {error}")
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sandledger")
def cli() -> None:
    """Server for the OpenSandbox lifecycle API on an append-only event log."""


@cli.command()
@_CONFIG
@click.option("--role", type=click.Choice([role.value for role in Role]), default="all", show_default=True)
@click.option("--no-migrate", is_flag=True, help="Do not touch the schema; exit when it is older than this version.")
def serve(config: Path | None, role: str, *, no_migrate: bool) -> None:
    """Run the API and the worker, or one of them, or only the proxy to sandboxes."""
    settings = settings_of(config)
    logs.configure(settings.log)
    go(lambda: run(settings, Role(role), say, upgrade=not no_migrate), loop=settings.server.loop)


@cli.command()
@_CONFIG
def migrate(config: Path | None) -> None:
    """Bring the database schema to this version; does nothing when it is."""
    settings = settings_of(config)

    async def work() -> None:
        async with open_database(settings, say, patient=True) as store:
            say(f"{store.where}: the schema is up to date")

    go(work)


@cli.command(name="doctor")
@_CONFIG
@click.option("--role", type=click.Choice([role.value for role in Role]), default="all", show_default=True)
def check(config: Path | None, role: str) -> None:
    """Check database, migrations, clock, and what a server of this role needs; exit 1 when something is wrong."""
    settings = settings_of(config)
    sys.exit(0 if go(lambda: doctor.examine(settings, say, Role(role))) else 1)


@cli.command()
@_CONFIG
@click.argument("sandbox", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def events(config: Path | None, sandbox: UUID, *, as_json: bool) -> None:
    """Print the event history of SANDBOX, live or gone."""
    settings = settings_of(config)
    go(lambda: timeline.print_history(settings, sandbox, say, as_json=as_json))


@cli.command(name="status")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show_status(config: Path | None, *, as_json: bool) -> None:
    """Show engines, queue, deadlines, stuck sandboxes and the log; exit 1 when something is wrong."""
    settings = settings_of(config)
    sys.exit(0 if go(lambda: status.show(settings, say, as_json=as_json)) else 1)


@cli.group()
def engines() -> None:
    """The engines that the log knows."""


@engines.command(name="ls")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def list_engines(config: Path | None, *, as_json: bool) -> None:
    """List engines with their state."""
    settings = settings_of(config)
    go(lambda: engine_commands.show(settings, say, as_json=as_json))


@engines.command(name="trust")
@_CONFIG
@click.argument("name")
def trust_engine(config: Path | None, name: str) -> None:
    """Follow the log again although engine NAME holds objects from beyond its end, e.g. after a restored backup."""
    settings = settings_of(config)
    go(lambda: engine_commands.trust(settings, name, say))


@engines.command(name="restore-mark")
@_CONFIG
@click.argument("name")
@click.option("--force", is_flag=True, help="Without proof that it is the engine of the log.")
def restore_mark(config: Path | None, name: str, *, force: bool) -> None:
    """Make the volume again by which engine NAME is known, e.g. after `docker volume prune`."""
    settings = settings_of(config)
    go(lambda: engine_commands.restore_mark(settings, name, say, force=force))


@cli.group()
def keys() -> None:
    """The master key that seals secrets."""


@keys.command(name="rotate-master")
@_CONFIG
@click.option("--generate", is_flag=True, help="First put a new key before the others in the key file.")
def rotate_master(config: Path | None, *, generate: bool) -> None:
    """Wrap every data key by the first configured master key. Online; run it again after an interruption."""
    settings = settings_of(config)
    go(lambda: key_commands.rotate_master(settings, say, generate=generate))


@cli.group()
def links() -> None:
    """Signed links to ports of a sandbox, for browsers."""


@links.command(name="create")
@_CONFIG
@click.argument("sandbox", type=click.UUID)
@click.argument("port", type=click.IntRange(1, MAX_PORT))
@click.option(
    "--expires-in", type=click.IntRange(1, LONGEST_SECONDS), default=3600, show_default=True, help="In seconds."
)
def create_link(config: Path | None, sandbox: UUID, port: int, expires_in: int) -> None:
    """Print the address of a new link to PORT of SANDBOX. Whoever has it reaches the port without a key."""
    settings = settings_of(config)
    go(lambda: link_commands.create(settings, sandbox, port, expires_in, say))


@links.command(name="revoke")
@_CONFIG
@click.argument("sandbox", type=click.UUID)
def revoke_links(config: Path | None, sandbox: UUID) -> None:
    """End all links of SANDBOX, and what they let in."""
    settings = settings_of(config)
    go(lambda: link_commands.revoke(settings, sandbox, say))


@cli.command(name="nginx")
@_CONFIG
@click.option("--domain", help="The domain of [proxy] wildcard; it is the default.")
@click.option("--listen", default="127.0.0.1:8088", show_default=True, help="ADDRESS:PORT where nginx listens.")
@click.option("--tls", nargs=2, metavar="CERT KEY", help="Files of the certificate and of its key.")
@click.option("--proxy", metavar="ADDRESS", help="A server with the role proxy; else [server] host and port.")
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the secret that the configuration includes; else nginx-secret.conf in the state directory.",
)
def print_nginx(config: Path | None, **given: Any) -> None:
    """Print the configuration of an nginx that carries bytes to sandboxes, where servers only decide."""
    settings = settings_of(config)
    wanted = nginx_commands.Wanted(**given)
    click.echo(go(lambda: nginx_commands.show(settings, wanted, say)), nl=False)


@cli.command(name="demo")
@_CONFIG
@click.option(
    "--agent-image", default="", help="An image with the agent that the engine has, for commands in a sandbox."
)
def show(config: Path | None, agent_image: str) -> None:
    """Show the main job on real parts, narrated, in under a minute."""
    settings = settings_of(config)
    go(lambda: play(settings, agent_image))
