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
    def shown(self) -> Figure:
        """A run that says what the verdict says."""
        wanted = self.missed < 2
        return next((run for run in self.runs if run.met is not (not wanted)), self.runs[-1])

    @property
    def met(self) -> bool | None:
        """Two runs out of three decide."""
        return None if self.runs[0].met is None else self.missed < 2


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
    """Run a case once; when it misses a target, up to twice more, until two runs agree about every figure."""
    runs: list[Sequence[Figure]] = []
    while True:
        runs.append(await case())
        for figure in runs[-1]:
            floor = f" vs {figure.floor}" if figure.floor else ""
            ratio = f" = {figure.ratio:.2f}x" if figure.ratio is not None else ""
            verdict = "" if figure.met is not False else "  [red]missed[/red]"
            CONSOLE.print(f"  {figure.what}: {figure.value}{floor}{ratio}{verdict}")
        results = [Result(figures) for figures in zip(*runs, strict=True)]
        if len(runs) == TRIES or all(result.missed in (0, 2) and _decided(result) for result in results):
            return results


def _decided(result: Result) -> bool:
    return result.missed == 2 or len(result.runs) - result.missed >= (1 if result.missed == 0 else 2)


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
