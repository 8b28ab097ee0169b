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
    "app.domain": ("app.errors",),
    "app.settings": ("app.errors",),
    "app.store": ("app.errors", "app.domain"),
    "app.agent": ("app.domain", "app.errors"),
    "app.runtime": ("app.domain", "app.errors"),
    "app.views": ("app.store", "app.domain", "app.errors"),
    "app.service": ("app.views", "app.store", "app.domain", "app.errors"),
    "app.work": ("app.service", "app.runtime", "app.agent", "app.views", "app.store", "app.domain", "app.errors"),
    "app.api": ("app.service", "app.runtime", "app.agent", "app.views", "app.store", "app.domain", "app.errors"),
    "app.proxy": ("app.service", "app.agent", "app.views", "app.store", "app.domain", "app.errors"),
    "app.server": (
        "app.api",
        "app.proxy",
        "app.work",
        "app.agent",
        "app.service",
        "app.runtime",
        "app.views",
        "app.store",
        "app.domain",
        "app.settings",
        "app.errors",
    ),
    "app.cli": ("app",),
    "app.__main__": ("app.cli",),
}
"""Room -> the rooms that it may import from, beside itself: only downwards, without exemption."""
STORE: dict[str, tuple[str, ...]] = {
    "app.store.tables": (),
    "app.store.durable": (),
    "app.store.addresses": ("app.store.log", "app.store.database", "app.store.tables"),
    "app.store.embedded": ("app.store.durable",),
    "app.store.database": ("app.store.tables",),
    "app.store.log": ("app.store.database", "app.store.tables"),
    "app.store.queue": ("app.store.log", "app.store.database", "app.store.tables"),
    "app.store.deadlines": ("app.store.log", "app.store.database", "app.store.tables"),
    "app.store.activity": ("app.store.database", "app.store.tables"),
    "app.store.metrics": ("app.store.database", "app.store.tables"),
    "app.store.stations": ("app.store.database", "app.store.tables"),
    "app.store.diagnostics": ("app.store.database", "app.store.tables"),
    "app.store.vault": ("app.store.log", "app.store.database", "app.store.tables", "app.store.durable"),
}
"""The same within the store."""
SEAM = ("app.runtime.docker", "app.runtime.fake")
"""Engines. Only the assembly and the command line know which there are; all others know the seam."""
OF_EVERY_TENANT = {"ANY_TENANT", "AnyTenant", "PLATFORM_TENANT"}
"""Names that reach beyond one tenant. The API acts for the tenant of its caller."""
PURE = "app.domain"
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


def _beyond(module: str, imported: str, rooms: dict[str, tuple[str, ...]], depth: int) -> str | None:
    room = ".".join(module.split(".")[:depth])
    if room not in rooms:
        return f"{room} is new: say in this test what it may import"
    allowed = (room, *rooms[room])
    return None if any(_within(imported, other) for other in allowed) else f"{room} imports only {allowed} of ours"


def wrong(module: str, imported: str) -> str | None:
    """Why this import is not allowed, or None."""
    ours, room = _within(imported, "app"), _part(module)
    if room == PURE and not ours:
        top = imported.split(".", maxsplit=1)[0]
        pure = top == "msgspec" or (top in sys.stdlib_module_names and top not in IMPURE)
        return None if pure else f"{PURE} is pure"
    if module == "app" or (not ours and room in ALLOWED) or imported == "app.__version__":
        return None
    if (found := _beyond(module, imported, ALLOWED, 2)) is not None:
        return found
    if _within(module, "app.store") and _within(imported, "app.store") and module != "app.store":
        return _beyond(module, imported, STORE, 3)
    if room in ("app.work", "app.api") and any(_within(imported, engine) for engine in SEAM):
        return f"{room} knows the seam, not an engine"
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
        ("app.domain.sandbox.decide", "app.store.log.store"),
        ("app.domain.sandbox.state", "asyncio"),
        ("app.domain.sandbox.state", "sqlalchemy"),
        ("app.store.log.store", "app.views.current"),
        ("app.store.log.store", "app.store.queue.reconcile"),
        ("app.store.database.pool", "app.store.log.store"),
        ("app.store.durable", "app.store.embedded.account"),
        ("app.store.embedded.server", "app.store.database.pool"),
        ("app.views.current", "app.service.sandboxes"),
        ("app.runtime.docker.driver", "app.store.log"),
        ("app.service.sandboxes", "app.work.worker"),
        ("app.service.sandboxes", "app.runtime.driver"),
        ("app.api.sandboxes", "app.work.worker"),
        ("app.api.sandboxes", "app.runtime.docker"),
        ("app.api.app", "app.proxy.http"),
        ("app.proxy.http", "app.api.errors"),
        ("app.proxy.resolve", "app.runtime.driver"),
        ("app.work.reconcile.reconciler", "app.api.schema"),
        ("app.work.reconcile.reconciler", "app.runtime.docker.driver"),
        ("app.store.database.pool", "app.cli.main"),
        ("app.server.process", "app.cli.commands"),
        ("app.errors", "app.domain"),
        ("app.utils.helpers", "os"),
    ],
)
def test_the_test_would_notice(module: str, imported: str):
    assert wrong(module, imported) is not None


def reaching_beyond(tree: ast.AST) -> list[str]:
    """Where a module names what reaches beyond one tenant: imported, renamed, or through another module."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names = {node.id}
        elif isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            names |= {"AnyTenant"} if node.module == "app.domain.tenants" or "tenants" in names else set()
        elif isinstance(node, ast.Import):
            names = {"AnyTenant"} if any(alias.name == "app.domain.tenants" for alias in node.names) else set()
        else:
            continue
        found += [f"{node.lineno}: {name}" for name in sorted(names & OF_EVERY_TENANT)]
    return found


@pytest.mark.parametrize("file", [file for file in FILES if _within(_module(file), "app.api")], ids=_module)
def test_the_api_acts_for_the_tenant_of_its_caller(file: Path):
    assert reaching_beyond(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "from app.domain.tenants import ANY_TENANT",
        "from app.views.current import ANY_TENANT as everybody",
        "from app.domain import tenants",
        "import app.domain.tenants",
        "from app.views import current\ncurrent.ANY_TENANT",
        "from app.domain.stream import PLATFORM_TENANT",
        "load(one, ANY_TENANT)",
    ],
)
def test_the_check_of_the_api_would_notice(text: str):
    assert reaching_beyond(ast.parse(text))


def standing_for_any_tenant(tree: ast.AST) -> list[str]:
    """Parameters and fields named `tenant` that may be left out or be None."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs = [*zip(reversed(positional), reversed(node.defaults), strict=False)]
            optional = {each.arg for each, _ in pairs}
            optional |= {
                each.arg for each, default in zip(node.kwonlyargs, node.kw_defaults, strict=True) if default is not None
            }
            typed = {each.arg: each.annotation for each in (*positional, *node.kwonlyargs)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            typed = {node.target.id: node.annotation}
            optional = set(typed) if node.value is not None else set()
        else:
            continue
        annotation = typed.get("tenant")
        nullable = annotation is not None and "None" in ast.unparse(annotation)
        if "tenant" in optional or nullable:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_whoever_forgets_the_tenant_gets_an_error(file: Path):
    """And not what belongs to everybody."""
    assert standing_for_any_tenant(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "def load(one, tenant=None): ...",
        "def load(one, tenant: str = 'default', more=1): ...",
        "def load(one, *, tenant: str = ''): ...",
        "def load(one, tenant: str | None): ...",
        "class Wanted:\n    tenant: str | None",
        "class Wanted:\n    tenant: str = 'default'",
    ],
)
def test_the_check_of_forgotten_tenants_would_notice(text: str):
    assert standing_for_any_tenant(ast.parse(text))


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
