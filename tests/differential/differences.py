"""Where we answer otherwise on purpose. What is not listed here fails the test, and so does an entry that nothing needs.

A difference is told by regular expressions that match the whole text of each part of a discrepancy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from tests.differential.seen import Discrepancy


class Difference(Struct, frozen=True):
    """One reason."""

    name: str
    reason: str
    case: str = ".*"
    what: str = ".*"
    theirs: str = ".*"
    ours: str = ".*"

    def explains(self, found: Discrepancy) -> bool:
        parts = ((self.case, found.case), (self.what, found.what), (self.theirs, found.theirs), (self.ours, found.ours))
        return all(re.fullmatch(pattern, text) for pattern, text in parts)


def judge(
    found: Sequence[Discrepancy], listed: Sequence[Difference], later: Sequence[Difference] = ()
) -> tuple[list[Discrepancy], list[Difference]]:
    """What no entry explains, and the entries that explain nothing."""
    used: set[str] = set()
    unexplained: list[Discrepancy] = []
    for each in found:
        names = {difference.name for difference in (*listed, *later) if difference.explains(each)}
        used |= names
        if not names:
            unexplained.append(each)
    return unexplained, [each for each in listed if each.name not in used]


LISTED: tuple[Difference, ...] = (
    # errors
    Difference(
        "code and message", "every error has them", what=r"body \$\.(code|message)", theirs="absent", ours="str"
    ),
    Difference("code of the framework's errors", "the same", what="code", theirs="absent", ours="GENERAL::.*"),
    Difference(
        "text of the framework's errors", "`message` has it", what=r"body \$\.detail", theirs="str", ours="absent"
    ),
    Difference("input is not echoed", "it may be a secret", what=r"body \$\.detail\[\]\.(input|ctx).*", ours="absent"),
    Difference("scheme of the key", "401 should name it", what="header www-authenticate", theirs="absent"),
    Difference(
        "every method is named",
        "`Allow` has HEAD and OPTIONS too, and those of all handlers of a path",
        what="header allow",
    ),
    # bodies and queries
    Difference("other content types", "a body is JSON, or 415", "create as .*", "status", "422", "415"),
    Difference(
        "bytes that are no text",
        "a body that cannot be read is 422 like every other",
        ".*xff.*",
        "status",
        "400",
        "422",
    ),
    Difference(
        "a parameter given twice", "which one would count?", "list page=1&pageSize=1&page=2", "status", "200", "422"
    ),
    Difference("a date is no instant", "midnight in which zone?", "renew 4: .*", "status", "200", "422"),
    Difference("a port that is no number", "the proxy has one code for ports", "proxy port x", "status", "422", "400"),
    Difference("a slash at the end", "no redirect for it", "slash at the end", "(status|header location)"),
    # what a Docker runtime does not have
    Difference(
        "fields that are not served",
        "501 names the field, whatever its value",
        "create (secureAccess|lifecycle|extensions) .*",
        "status",
        "4..",
        "501",
    ),
    Difference("pools and templates", "501 before the body is read", "unserved (POST|PUT) .*", "status", "422", "501"),
    # cross-origin requests
    Difference("origins", "without credentials, and so for any origin alike", what="header (access-control-.*|vary)"),
    Difference("preflight", "without a body", "preflight", "status", "200", "204"),
    # endpoints and proxy
    Difference(
        "headers of endpoints",
        "the object's generation, and the agent's token",
        "(port|use_server_proxy|expires|endpoint).*",
        r"body \$\.headers.*",
        "absent",
    ),
    Difference(
        "endpoint of an exited sandbox", "nothing answers there", "endpoint of an exited one", "status", "200", "409"
    ),
    Difference(
        "the program's headers",
        "answers of a sandbox are the sandbox's own",
        r"proxy (?!port|to a deleted|\w+ nothing listens).*",
        "header (server|date)",
        ours="absent",
    ),
    # additions
    Difference("cursor", "lists have cursors", what=r"body \$\.nextCursor", theirs="absent"),
)
LATER: tuple[Difference, ...] = (
    Difference(
        "volumes, network policies", "being built", "create (volumes|networkPolicy) .*|absent .*policy", ours="501"
    ),
)
"""May be seen or not: these parts are being built, and are 501 by name meanwhile. What is built is compared."""
