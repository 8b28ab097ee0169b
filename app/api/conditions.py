"""Request headers with a grammar of their own: entity tags (RFC 9110, sections 8.8.3 and 13.1) and Prefer (RFC 7240).

A sandbox's entity tag is its version in quotes. `If-Match` compares strongly, so weak tags never match; `If-None-Match`
compares weakly. A malformed tag list is 400: ignoring a precondition would do what the client wanted to prevent. A
malformed preference is ignored, as RFC 7240 asks.
"""

from __future__ import annotations

import re

from msgspec import Struct

from app.api.errors import INVALID_HEADER, Problem
from app.domain.sandbox.state import Sandbox
from app.errors import PreconditionFailed

_TAG = r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_EACH_TAG = re.compile(_TAG)
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
# Possessive throughout. Spaces may stand almost anywhere, and with backtracking each would double the ways to fail.
_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_VALUE = rf'(?:"((?:[^"\\]|\\.)*+)"|({_WORD}))'
_BESIDE = rf"{_WORD}(?:[ \t]*+=[ \t]*+{_VALUE}?+)?+"
_PREFERENCE = re.compile(
    rf"[ \t,]*+({_WORD})(?:[ \t]*+=[ \t]*+{_VALUE}?+)?+(?:[ \t]*+;[ \t]*+(?:{_BESIDE})?+)*+[ \t]*+(?:,|$)"
)


def etag(sandbox: Sandbox) -> tuple[str, str]:
    """The header with the strong entity tag of a state."""
    return ("etag", f'"{sandbox.version}"')


def _tags(header: str, name: str) -> list[tuple[bool, str]]:
    """(weak, opaque) of each."""
    if not _TAGS.fullmatch(header):
        raise Problem(400, INVALID_HEADER, f'{name} must be * or a list of entity tags such as "3".')
    return [(bool(weak), opaque) for weak, opaque in _EACH_TAG.findall(header)]


def demanded(if_match: str | None) -> frozenset[int] | None:
    """The versions that `If-Match` allows; None = any."""
    if if_match is None or if_match.strip() == "*":
        return None
    tags = _tags(if_match, "If-Match")
    return frozenset(int(tag) for weak, tag in tags if not weak and _VERSION.fullmatch(tag))


def present(sandbox: Sandbox, versions: frozenset[int]) -> int:
    """The version that the sandbox is at, if it is one of these.

    Raises:
        PreconditionFailed: it is not.
    """
    if sandbox.version not in versions:
        raise PreconditionFailed(
            "SANDLEDGER::VERSION_MISMATCH",
            f"No tag of If-Match names the sandbox's version, which is {sandbox.version}; read its ETag again.",
        )
    return sandbox.version


def not_modified(if_none_match: str | None, sandbox: Sandbox) -> bool:
    """Whether `If-None-Match` names the present state."""
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    return any(tag == str(sandbox.version) for _, tag in _tags(if_none_match, "If-None-Match"))


class Preferences(Struct, frozen=True):
    """The part of `Prefer` that this server follows."""

    respond_async: bool = False
    wait: int | None = None
    """Seconds."""

    @property
    def applied(self) -> list[tuple[str, str]]:
        """The header `Preference-Applied`, or no header."""
        asked = ["respond-async"] if self.respond_async else []
        value = ", ".join([*asked, *([] if self.wait is None else [f"wait={self.wait}"])])
        return [("preference-applied", value)] if value else []


def preferences(header: str | None, longest: int) -> Preferences:
    """Read `Prefer`. Of a preference that stands twice, the first counts. `wait` is cut to `longest`."""
    if not header:
        return Preferences()
    found: dict[str, str] = {}
    at = 0
    while at < len(header):
        match = _PREFERENCE.match(header, at)
        if match is None:
            at = header.find(",", at) + 1 or len(header)
            continue
        found.setdefault(match[1].lower(), match[2] or match[3] or "")
        at = match.end()
    seconds = found.get("wait", "")
    wait = min(int(seconds[:10]), longest) if re.fullmatch(r"[0-9]+", seconds) else None
    return Preferences("respond-async" in found, wait)
