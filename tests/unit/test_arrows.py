"""Who may import whom. The architecture is only as true as this file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "app"
FILES = sorted(APP.rglob("*.py"))
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60

ALLOWED: dict[str, tuple[str, ...]] = {
    "app.errors": (),
    "app.sandbox": ("app.errors",),
    "app.database": ("app.errors",),
    "app.settings": ("app.errors",),
    "app.log": ("app.database", "app.errors"),
    "app.vault": ("app.database", "app.errors"),
    "app.views": ("app.sandbox", "app.database", "app.errors", "app.log.tables"),
    "app.runtime": ("app.sandbox", "app.errors"),
    "app.service": (
        "app.sandbox",
        "app.log",
        "app.views",
        "app.vault",
        "app.work.effects",
        "app.database",
        "app.errors",
    ),
}
"""Part -> what of ours it may import, beside itself. Parts that are not named are shells: see FORBIDDEN."""
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "app.api": ("app.work", "app.runtime.docker", "app.runtime.fake", "app.server", "app.cli"),
    "app.work": ("app.api", "app.runtime.docker", "app.runtime.fake", "app.server", "app.cli"),
    "app.server": ("app.cli",),
    "app.cli": (),
    "app.__main__": (),
}
PURE = "app.sandbox"
"""Takes nothing from outside but the standard library without I/O, and msgspec."""
IMPURE = {"asyncio", "os", "io", "socket", "subprocess", "threading", "time", "random", "secrets", "pathlib", "logging"}


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module), with what is imported from a package spelled out, since it may be a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def _part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def wrong(module: str, imported: str) -> str | None:
    """Why this import is not allowed, or None."""
    ours, part = _within(imported, "app"), _part(module)
    if ours and _within(imported, "app.cli") and part not in ("app.__main__", "app.cli"):
        return "nobody but the command line needs it"
    if part in FORBIDDEN:
        return next((f"{part} may not know {other}" for other in FORBIDDEN[part] if _within(imported, other)), None)
    if part not in ALLOWED and part != "app":
        return f"{part} is new: say in this test what it may import"
    if ours and not any(_within(imported, other) for other in (part, *ALLOWED.get(part, ()))):
        return f"{part} imports only {ALLOWED.get(part, ())} of ours"
    if part == PURE and not ours:
        top = imported.split(".", maxsplit=1)[0]
        if top != "msgspec" and (top not in sys.stdlib_module_names or top in IMPURE):
            return f"{PURE} is pure"
    return None


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_arrows(file: Path):
    module = _module(file)
    found = [
        f"{file.relative_to(ROOT)}:{line}: {module} -> {imported}: {why}"
        for line, imported in _imports(file)
        if (why := wrong(module, imported)) is not None
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("app.sandbox.decide", "app.log.store"),
        ("app.sandbox.state", "asyncio"),
        ("app.sandbox.state", "sqlalchemy"),
        ("app.log.store", "app.sandbox.events"),
        ("app.views.current", "app.log.store"),
        ("app.views.current", "app.service"),
        ("app.vault.seal", "app.sandbox"),
        ("app.runtime.docker.driver", "app.log"),
        ("app.service", "app.work.queue"),
        ("app.service", "app.runtime.driver"),
        ("app.api.sandboxes", "app.work.queue"),
        ("app.api.sandboxes", "app.runtime.docker"),
        ("app.work.reconciler", "app.api.schema"),
        ("app.work.reconciler", "app.runtime.docker.driver"),
        ("app.database.engine", "app.cli.main"),
        ("app.errors", "app.sandbox"),
        ("app.utils.helpers", "os"),
    ],
)
def test_the_test_would_notice(module: str, imported: str):
    assert wrong(module, imported) is not None


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_size_and_shape(file: Path):
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES, f"{file}: over {MOST_LINES} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= MOST_LINES_OF_A_FUNCTION, f"{file}:{node.lineno}: {node.name} has {length} lines"
        hidden = [inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)]
        assert not hidden, f"{file}:{node.lineno}: {node.name} imports inside"


def test_no_drawers_for_leftovers():
    names = {part for file in FILES for part in file.relative_to(APP).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "helper", "common", "base", "misc"}
