"""Image references, as the distribution project's grammar has them: `[host[:port]/]path[:tag][@digest]`.

A reference is public: it stands in events, labels, answers and logs for ever. So what does not follow the grammar is
refused before anything is written. That keeps out what no engine could pull anyway, and above all
`user:password@host/image` and `https://user:password@host/image`, which people paste from elsewhere.
"""

from __future__ import annotations

import re

from app.api.errors import INVALID_PARAMETER
from app.errors import Invalid

_SNAPSHOTS = "sandledger-snapshot"
"""Images of snapshots on the engine, of every tenant, begin with this."""
_IMAGE_ID = re.compile(r"(sha256:)?[0-9a-f]{64}|sha256:[0-9a-f]+")
"""An engine runs every image that it has by such a name, whichever tenant it is of."""
_MAX_CHARACTERS = 255
"""Of host and path each; the engines' own bound."""
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*+(?<!-))?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*+|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?"
_PART = r"[a-z0-9]++(?:(?:\.|__?|-++)[a-z0-9]++)*+"
_REFERENCE = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<path>{_PART}(?:/{_PART})*+)"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,128})?"
)


def check_image(uri: str) -> None:
    """Nothing but a reference.

    Raises:
        Invalid: it is none; the text is not repeated, it may hold a password.
    """
    # Far longer than any reference: not worth matching.
    if _IMAGE_ID.fullmatch(uri):
        raise Invalid(INVALID_PARAMETER, "image.uri must be an image reference and not the id of an image.")
    found = None if len(uri) > 4 * _MAX_CHARACTERS else _REFERENCE.fullmatch(uri)
    if found is None or max(len(found["host"] or ""), len(found["path"])) > _MAX_CHARACTERS:
        raise Invalid(
            INVALID_PARAMETER,
            "image.uri must be an image reference such as registry.example/team/name:tag, in lower case, without "
            "scheme or credentials; those belong into image.auth.",
        )
    if any(part.startswith(_SNAPSHOTS) for part in found["path"].split("/")):
        raise Invalid(INVALID_PARAMETER, "Images of snapshots are used by snapshotId and not by image.uri.")
