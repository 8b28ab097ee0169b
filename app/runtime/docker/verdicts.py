"""From the engine's texts to typed faults. The engine has no codes of its own, so its words are all there is.

The tables were made by provoking the cases on a real engine; a few fragments are those of its other image store. What
no table knows: a failed pull or start counts as an attempt (`AttemptFailed`), a failed create is the engine's trouble
(`RuntimeUnavailable`); so a new text delays a verdict but neither invents one nor waits for ever on a sandbox that
cannot start.

Every text that leaves through here has lost the values of the workload's environment and its password: the engine
repeats malformed input in its errors.
"""

from __future__ import annotations

import re
from enum import Enum
from http import HTTPStatus

from msgspec import Struct

from app.errors import RuntimeFault, RuntimeRejected, RuntimeUnavailable
from app.runtime.docker.engine import Refused
from app.runtime.driver import RegistryAuth, Workload
from app.runtime.faults import AttemptFailed, ImagePullFailed

HIDDEN = "***"
SHORTEST_SECRET = 4
"""Shorter values are not searched for: they would punch holes into every message and give nothing away."""

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

NO_IMAGE = ("no such image", "image with reference")
START_ENGINE = (*ENGINE, "no space left on device", "too many open files", "context deadline exceeded")
START_FINAL = (
    "oci runtime",
    "could not select device driver",
    "unable to find user",
    "unable to find group",
    "no matching entries in",
    "seccomp",
    "apparmor",
    "logging driver",
)
PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}


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
    """The pull failed because of the engine."""

    message: str

    def error(self) -> RuntimeFault:
        """The error to raise."""
        return RuntimeUnavailable(self.message)


def clean(text: str, work: Workload) -> str:
    """The text without any value of the workload's environment and without its password."""
    return _without(text, [*work.env.values(), *([work.auth.password] if work.auth else [])])


def create_verdict(work: Workload, refused: Refused) -> RuntimeFault:
    """A create call that was refused for another reason than its name or a missing image."""
    message = clean(refused.message, work)
    if refused.status >= HTTPStatus.INTERNAL_SERVER_ERROR or refused.status in PASSING:
        return RuntimeUnavailable(f"the engine could not create the container: {message}")
    if _any(message, REFERENCE):
        return RuntimeRejected("IMAGE_REFERENCE_INVALID", message)
    return RuntimeRejected("SPEC_REJECTED", message)


def is_image_missing(refused: Refused) -> bool:
    """True when a create call needs a pull first: nothing local, or only another platform's."""
    return refused.status == HTTPStatus.NOT_FOUND and _any(refused.message, NO_IMAGE)


def still_missing(work: Workload, refused: Refused) -> RuntimeFault:
    """A create call that found no image although the pull before it had succeeded."""
    if _any(refused.message, PLATFORM):
        return RuntimeRejected("IMAGE_PLATFORM_MISMATCH", clean(refused.message, work))
    return ImagePullFailed(
        "IMAGE_PULL_FAILED", f"{work.image} was pulled and is gone again: {clean(refused.message, work)}"
    )


def start_verdict(work: Workload, refused: Refused) -> RuntimeFault:
    """A start call that was refused. 404 for the container itself and 409 are the caller's to know."""
    message = clean(refused.message, work)
    text = message.lower()
    if _any(text, START_ENGINE) or refused.status > HTTPStatus.INTERNAL_SERVER_ERROR or refused.status in PASSING:
        return RuntimeUnavailable(f"the engine could not start the container: {message}")
    if "exec:" in text and ("executable file not found" in text or "no such file or directory" in text):
        return RuntimeRejected("ENTRYPOINT_NOT_FOUND", message)
    if "exec:" in text and "permission denied" in text:
        return RuntimeRejected("ENTRYPOINT_NOT_EXECUTABLE", message)
    if refused.status < HTTPStatus.INTERNAL_SERVER_ERROR or _any(text, START_FINAL):
        return RuntimeRejected("START_REJECTED", message)
    return AttemptFailed("START_FAILED", message)


def pull_cause(image: str, auth: RegistryAuth | None, text: str) -> PullCause | EngineCause:
    """A failed pull, by the engine's words about it."""
    message = _without(_without_queries(text), [auth.password] if auth else [])
    words = _without_names(message, image).lower()
    if _any(words, ENGINE):
        return EngineCause(f"the engine could not pull {image}: {message}")
    weight, reason = _sort(words, given=auth is not None)
    return PullCause(weight, reason, message)


def pull_timeout(image: str, seconds: float) -> PullCause:
    """A pull that took longer than the operator allows."""
    message = f"{image} was not there after {seconds:g} s; see the registry, or raise docker.pull_timeout_seconds"
    return PullCause(Weight.ATTEMPT, "IMAGE_PULL_TIMEOUT", message)


def _sort(words: str, *, given: bool) -> tuple[Weight, str]:
    """The order matters: a rate limit may say "denied", a lookup that failed says "no such host ... not found"."""
    if _any(words, REFERENCE):
        return Weight.FINAL, "IMAGE_REFERENCE_INVALID"
    if _any(words, PLATFORM):
        return Weight.FINAL, "IMAGE_PLATFORM_MISMATCH"
    if _any(words, RATE):
        return Weight.ATTEMPT, "REGISTRY_RATE_LIMITED"
    if NOT_FOUND_OR_PRIVATE in words and not given:
        # Registries that hide what is private answer both alike; a mistyped name is the likelier one.
        return Weight.FINAL, "IMAGE_NOT_FOUND"
    if _any(words, DENIED):
        return Weight.FINAL, "IMAGE_AUTH_FAILED" if given else "IMAGE_AUTH_REQUIRED"
    if _any(words, NETWORK):
        return Weight.ATTEMPT, "REGISTRY_UNREACHABLE"
    if _any(words, ABSENT):
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


def _without(text: str, secrets: list[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):  # longest first: one may contain another
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def _any(text: str, fragments: tuple[str, ...]) -> bool:
    lowered = text.lower()
    return any(fragment in lowered for fragment in fragments)
