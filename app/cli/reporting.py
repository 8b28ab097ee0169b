"""How commands speak to the person at the terminal: lines on standard error, results on standard output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.domain.text import printable

Say: TypeAlias = Callable[[str], None]
"""Prints one line."""
_WIDTH = 160
"""Of tables that are not read on a terminal."""


def say(line: str) -> None:
    """A line for the person at the terminal."""
    click.echo(line, err=True)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on standard output."""
    click.echo(msgspec.json.encode(value))


def console() -> Console:
    """For tables: as wide as the terminal, and never shortened."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def table(*headings: str, title: str | None = None) -> Table:
    """A table with these columns and no rows yet."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        made.add_column(heading, overflow="fold")
    return made


def plain(text: str, style: str = "") -> Text:
    """Text from the log. It may repeat what an engine or an image said: it drives no terminal and is no markup."""
    return Text(printable(text), style=style)
