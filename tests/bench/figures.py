"""Figures: what was measured, the floor beside it, the target, and whether it is met."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from msgspec import Struct
from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
TRIES = 3


class Figure(Struct, frozen=True):
    """One line of the table. `met` is None for a figure without a target."""

    what: str
    value: str
    floor: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None


class Result(Struct, frozen=True):
    """A figure over all its runs: missed only if two runs missed it."""

    runs: tuple[Figure, ...]

    @property
    def missed(self) -> int:
        """How many runs missed the target."""
        return sum(run.met is False for run in self.runs)

    @property
    def met(self) -> bool | None:
        """The verdict; None for a figure without a target."""
        return None if self.runs[0].met is None else self.missed < 2

    @property
    def shown(self) -> Figure:
        """A run that says what the verdict says."""
        return next((run for run in self.runs if run.met is self.met), self.runs[-1])

    @property
    def decided(self) -> bool:
        """No run missed, or two missed, or two met and one missed. One miss alone asks for more runs."""
        return self.missed != 1 or len(self.runs) == TRIES


Case: TypeAlias = Callable[[], Awaitable[Sequence[Figure]]]


def at_least(what: str, value: str, floor: str, ratio: float, target: float) -> Figure:
    """A ratio that must reach a target."""
    return Figure(what, value, floor, ratio, f">= {target:g}", ratio >= target)


def at_most(what: str, value: str, floor: str, ratio: float, target: float) -> Figure:
    """A ratio that must not exceed a target."""
    return Figure(what, value, floor, ratio, f"<= {target:g}", ratio <= target)


def ms(seconds: float) -> str:
    """Milliseconds, for people."""
    return f"{seconds * 1000:.2f} ms"


async def measure(case: Case) -> list[Result]:
    """Run a case once. When a figure misses its target, run it up to twice more, until all figures are decided."""
    runs: list[Sequence[Figure]] = []
    while True:
        runs.append(await case())
        for figure in runs[-1]:
            floor = f" vs {figure.floor}" if figure.floor else ""
            ratio = f" = {figure.ratio:.2f}x" if figure.ratio is not None else ""
            verdict = "" if figure.met is not False else "  [red]missed[/red]"
            CONSOLE.print(f"  {figure.what}: {figure.value}{floor}{ratio}{verdict}")
        results = [Result(figures) for figures in zip(*runs, strict=True)]
        if all(result.decided for result in results):
            return results


def show(results: Sequence[Result]) -> None:
    """The table."""
    table = Table(title="Sandledger bench", box=None, header_style="bold", title_justify="left")
    for heading in ("what", "value", "floor", "ratio", "target", "met", "runs"):
        table.add_column(heading, overflow="fold")
    for result in results:
        figure = result.shown
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        verdict = {True: "yes", False: "NO", None: ""}[result.met]
        table.add_row(figure.what, figure.value, figure.floor, ratio, figure.target, verdict, str(len(result.runs)))
    CONSOLE.print(table)
