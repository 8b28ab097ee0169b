"""Request headers with a grammar of their own: entity tags (RFC 9110, sections 8.8.3 and 13.1) and Prefer (RFC 7240).

A sandbox's entity tag is its version in quotes. `If-Match` compares strongly, so weak tags never match; `If-None-Match`
compares weakly. A malformed tag list is 400: ignoring a precondition would do what the client wanted to prevent. A
malformed preference is ignored, as RFC 7240 asks.
"""

from __future__ import annotations

import re

from msgspec import Struct

from app.api.call import Call
from app.api.errors import INVALID_HEADER, Problem
from app.domain.sandbox.decide import unknown
from app.domain.sandbox.state import Sandbox
from app.errors import PreconditionFailed
from app.service.sandboxes import Service

_TAG = r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_EACH_TAG = re.compile(_TAG)
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
# Possessive throughout: spaces may stand almost anywhere, and with backtracking each would double the ways to fail.
_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_VALUE = rf'(?:"((?:[^"\\]|\\.)*+)"|({_WORD}))'
_BESIDE = rf"{_WORD}(?:[ \t]*+=[ \t]*+{_VALUE}?+)?+"
_PREFERENCE = re.compile(
    rf"[ \t,]*+({_WORD})(?:[ \t]*+=[ \t]*+{_VALUE}?+)?+(?:[ \t]*+;[ \t]*+(?:{_BESIDE})?+)*+[ \t]*+(?:,|$)"
)


def etag(box: Sandbox) -> str:
    """The strong entity tag of a state."""
    return f'"{box.version}"'


def _tags(header: str, name: str) -> list[tuple[bool, str]]:
    """(weak, opaque) of each."""
    if not _TAGS.fullmatch(header):
        raise Problem(400, INVALID_HEADER, f'{name} must be * or a list of entity tags such as "3".')
    return [(bool(weak), opaque) for weak, opaque in _EACH_TAG.findall(header)]


async def expected_version(call: Call, service: Service, tenant: str) -> int | None:
    """What `If-Match` demands of the sandbox in the path; None = nothing, beyond that it exists.

    One tag goes straight into the append's guard. Of several, the one that fits now does.

    Raises:
        PreconditionFailed: none of the tags can match.
    """
    header = call.headers.get("if-match")
    if header is None or header.strip() == "*":
        return None
    versions = {int(tag) for weak, tag in _tags(header, "If-Match") if not weak and _VERSION.fullmatch(tag)}
    if len(versions) == 1:
        return versions.pop()
    loaded = await service.view.load(call.sandbox(), tenant)
    if loaded is None:
        raise unknown(call.sandbox())
    present = loaded[0].version
    if present not in versions:
        raise PreconditionFailed(
            "SANDLEDGER::VERSION_MISMATCH",
            f"No tag of If-Match names the sandbox's version, which is {present}; read its ETag again.",
        )
    return present


def not_modified(call: Call, box: Sandbox) -> bool:
    """Whether `If-None-Match` names the present state."""
    header = call.headers.get("if-none-match")
    if header is None:
        return False
    if header.strip() == "*":
        return True
    return any(tag == str(box.version) for _, tag in _tags(header, "If-None-Match"))


class Preferences(Struct, frozen=True):
    """What of `Prefer` this server knows."""

    respond_async: bool = False
    wait: int | None = None
    """Seconds."""

    @property
    def applied(self) -> str | None:
        """The value of `Preference-Applied`."""
        asked = ["respond-async"] if self.respond_async else []
        return ", ".join([*asked, *([] if self.wait is None else [f"wait={self.wait}"])]) or None


def preferences(call: Call, longest: int) -> Preferences:
    """Read `Prefer`; of a preference that is given twice, the first counts. `wait` is cut to `longest`."""
    found: dict[str, str] = {}
    header, at = call.headers.get("prefer", ""), 0
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
