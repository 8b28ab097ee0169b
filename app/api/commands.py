"""From a request to a command on one sandbox: the only place of this package that calls `service.execute`."""

from __future__ import annotations

from uuid import UUID

from app.api.call import uuid_in
from app.api.conditions import demanded, present
from app.api.context import ApiContext
from app.api.request import ApiRequest
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.decide import unknown
from app.errors import NotFound
from app.service.sandboxes import Outcome


def sandbox_of(text: str) -> UUID:
    """The id in a path.

    Raises:
        NotFound: it is no UUID, so no sandbox can have it.
    """
    found = uuid_in(text)
    if found is None:
        raise NotFound(unknown("").code, "Sandbox ids are UUIDs; there is no sandbox with the id in this path.")
    return found


async def execute(
    context: ApiContext, request: ApiRequest, sandbox_id: str, command: cmd.Command, if_match: str | None
) -> Outcome:
    """Carry the command out.

    One tag of `If-Match` goes straight into the append's guard. Of several, the one that fits now does.

    Raises:
        Rejected: the sandbox does not exist, is at another version, or does not allow the command.
    """
    identity, tenant = sandbox_of(sandbox_id), request.tenant
    versions, expected = demanded(if_match), None
    if versions is not None and len(versions) == 1:
        (expected,) = versions
    elif versions is not None:
        loaded = await context.service.view.load(identity, tenant)
        if loaded is None:
            raise unknown(identity)
        expected = present(loaded[0], versions)
    return await context.service.execute(identity, tenant, command, request.call.meta(), if_match=expected)
