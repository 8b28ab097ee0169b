"""What the agent says by itself about a port of its sandbox.

execd passes requests to `/proxy/{port}` on, and answers 502 with the text `Bad Gateway` when no program listens there,
or the program gives no answer (`components/execd/pkg/web/proxy.go`, `http.Error`). Nothing else marks that answer as
the agent's. A program that answers exactly the same is taken for silent; its status stays, and only the body is ours.
"""

from __future__ import annotations

from typing import Final

from app.proxy.client import Answer

_STATUS: Final = 502
_TEXT: Final = b"Bad Gateway\n"
_MARKS: Final = {
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", str(len(_TEXT)).encode()),
    (b"x-content-type-options", b"nosniff"),
}


async def nothing_listens(answer: Answer) -> bool:
    """Whether the agent says that nothing answers on the port. What is read to know it is read again by the caller.

    Raises:
        Cut: the answer ended in its middle.
    """
    if answer.status != _STATUS or not {(name.lower(), value) for name, value in answer.headers} >= _MARKS:
        return False
    return await answer.peek(len(_TEXT)) in (b"", _TEXT)  # empty: the answer to a HEAD
