"""What every controller of this package has."""

from __future__ import annotations

from typing import Any, ClassVar, Final, TypeVar

from litestar import Controller

from app.api.context import ApiContext

OPEN: Final[dict[str, Any]] = {"open": True}
"""`opt` of handlers that need no key."""
C = TypeVar("C", bound="type[ApiController]")


class ApiController(Controller):
    """A resource. Its handlers find their services here: injection for each request costs as much as all the rest of
    the framework.
    """

    context: ClassVar[ApiContext]


def bound(controller: C, context: ApiContext) -> C:
    """The controller on a context. Litestar makes the instances itself, so the context is given to a class."""
    return type(controller.__name__, (controller,), {"context": context, "__module__": controller.__module__})  # pyright: ignore[reportReturnType]
