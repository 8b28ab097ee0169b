"""From the engine's words about a pull to typed causes. It has no codes, so its words are all there is.

The tables were made by provoking the cases on a real engine; a few fragments are those of its other image store. Final
is what names the reference, the registry's answer about it, or the platform. What no table knows counts as an attempt.
"""

from __future__ import annotations

import re
from enum import Enum

from msgspec import Struct

from app.domain.text import storable
from app.errors import RuntimeFault, RuntimeRejected, RuntimeUnavailable
from app.runtime.docker.verdicts import has_any, without
from app.runtime.driver import Image
from app.runtime.faults import ImagePullFailed

PLATFORM = ("no matching manifest", "no match for platform", "does not match the specified platform")
RATE = ("toomanyrequests", "too many requests", "rate limit")
ENGINE = ("containerd.sock", "transport is closing", "error while dialing")
NETWORK = (
    "no such host",
    "name resolution",
    "server misbehaving",
    "connection refused",
    "connection reset",
    "network is unreachable",
    "no route to host",
    "timeout",
    "deadline exceeded",
    "request canceled",
    "tls:",
    "x509:",
    "eof",
    "gave http response",
    "unexpected http status: 5",
    "unexpected status code 5",
    "unexpected status from",
    "bad gateway",
    "service unavailable",
)
NOT_FOUND_OR_PRIVATE = "repository does not exist or may require"
DENIED = (
    "no basic auth credentials",
    "unauthorized",
    "authentication required",
    "incorrect username",
    "insufficient_scope",
    "authorization failed",
    "denied",
    "forbidden",
)
ABSENT = ("manifest unknown", "name unknown", "not found", "does not exist")
REFERENCE = ("invalid reference", "invalid tag", "tag invalid", "invalid digest", "is a reserved name")


class Weight(Enum):
    """What a failed pull means for the sandbox."""

    FINAL = RuntimeRejected
    ATTEMPT = ImagePullFailed


class PullCause(Struct, frozen=True):
    """Why a pull failed, as a value: each of those who wait for one pull raises an error of its own."""

    weight: Weight
    reason: str
    message: str

    def error(self) -> RuntimeFault:
        """The error to raise."""
        return self.weight.value(self.reason, self.message)


class EngineCause(Struct, frozen=True):
    """The pull failed because of the engine, or of what stands before it."""

    message: str
    retry_after: float | None = None

    def error(self) -> RuntimeFault:
        """The error to raise."""
        return RuntimeUnavailable(self.message, retry_after=self.retry_after)


def pull_cause(image: Image, text: str) -> PullCause | EngineCause:
    """A failed pull, by the engine's words about it."""
    message = storable(without(_without_queries(text), [image.auth.password] if image.auth else []))
    words = _without_names(message, image.reference).lower()
    if has_any(words, ENGINE):
        return EngineCause(f"the engine could not pull {image.reference}: {message}")
    weight, reason = _sort(words, given=image.auth is not None)
    # Some registries answer "manifest unknown" and no more.
    return PullCause(weight, reason, message if image.reference in message else f"{image.reference}: {message}")


def pull_timeout(reference: str, seconds: float) -> PullCause:
    """A pull that took longer than the operator allows."""
    message = f"{reference} was not there after {seconds:g} s; see the registry, or raise docker.pull_timeout_seconds"
    return PullCause(Weight.ATTEMPT, "IMAGE_PULL_TIMEOUT", message)


def vanished(reference: str) -> PullCause:
    """A pull that succeeded, and no image afterwards."""
    return PullCause(Weight.ATTEMPT, "IMAGE_PULL_FAILED", f"{reference} was pulled and is gone again")


def other_platform(image: Image, found: str) -> PullCause:
    """A pull that succeeded, and brought an image of another platform."""
    message = f"{image.reference} was asked for {image.platform}, and its registry has it for {found} only"
    return PullCause(Weight.FINAL, "IMAGE_PLATFORM_MISMATCH", message)


def _sort(words: str, *, given: bool) -> tuple[Weight, str]:
    """The order matters: a rate limit may say "denied", a lookup that failed says "no such host ... not found"."""
    if has_any(words, REFERENCE):
        return Weight.FINAL, "IMAGE_REFERENCE_INVALID"
    if has_any(words, PLATFORM):
        return Weight.FINAL, "IMAGE_PLATFORM_MISMATCH"
    if has_any(words, RATE):
        return Weight.ATTEMPT, "REGISTRY_RATE_LIMITED"
    if NOT_FOUND_OR_PRIVATE in words and not given:
        # Registries that hide what is private answer both alike; a mistyped name is the likelier one.
        return Weight.FINAL, "IMAGE_NOT_FOUND"
    if has_any(words, DENIED):
        return Weight.FINAL, "IMAGE_AUTH_FAILED" if given else "IMAGE_AUTH_REQUIRED"
    if has_any(words, NETWORK):
        return Weight.ATTEMPT, "REGISTRY_UNREACHABLE"
    if has_any(words, ABSENT):
        return Weight.FINAL, "IMAGE_NOT_FOUND"
    if "cannot parse platform" in words:
        return Weight.FINAL, "SPEC_REJECTED"
    return Weight.ATTEMPT, "IMAGE_PULL_FAILED"


def _without_names(message: str, image: str) -> str:
    """The image's own name must not decide: it is in most messages, and it may contain any of the words."""
    message = re.sub(r'"https?://[^"]*"', "", message)
    folder, slash, last = image.partition("@")[0].rpartition("/")
    if not slash:
        return message  # a single word, and the word itself may be the engine's
    return message.replace(f"{folder}/{last.partition(':')[0]}", "")


def _without_queries(text: str) -> str:
    """Redirects to storage carry signatures in their query."""
    return re.sub(r"(https?://[^\s\"?]+)\?[^\s\"]*", r"\1", text)
