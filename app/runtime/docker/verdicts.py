"""From the engine's refusals to typed faults. The engine has no codes of its own, so its words are all there is.

Three answers are possible.

* `RuntimeUnavailable`: the engine is overloaded or failing, or a proxy or plugin in front of it forbids us the call.
* `RuntimeRejected`: final. Only what the request itself decides: its program is missing or cannot be executed, its user
  or group does not exist, no driver for the devices that it asks for, its reference, its limits.
* `AttemptFailed`: everything else. Most of it is trouble of the host or of the operator's settings, which looks the
  same for every sandbox; a sandbox waits for it to be mended until its time is up, and then ends with these words.

So an unknown text delays a final verdict. It never causes one.

Every text that leaves through here has lost the values of the workload's environment and its password, because the
engine repeats malformed input in its errors; and it has lost its control characters.
"""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from app.domain.text import storable
from app.errors import RuntimeFault, RuntimeRejected
from app.runtime.docker.engine import Refused, trouble
from app.runtime.docker.spec import program
from app.runtime.driver import Power, Workload
from app.runtime.faults import AddressTaken, AgentMissing, AttemptFailed, ImageMissing, NetworkMissing

HIDDEN = "***"
MIN_SECRET_CHARS = 4
"""Shorter values are not searched for: they would punch holes into every message and give nothing away."""

NO_IMAGE = ("no such image", "image with reference")
REFERENCE = ("invalid reference", "invalid tag", "tag invalid", "invalid digest", "is a reserved name")
SPEC = (
    "minimum memory limit",
    "range of cpus is from",
    "invalid environment variable",
    "cannot parse platform",
    "unknown operating system or architecture",
)
"""About the limits, the environment or the platform of the request."""
USER = ("unable to find user", "unable to find group", "no matching entries in")
DEVICE = ("could not select device driver",)
ABSENT = ("executable file not found", "no such file or directory")
FORBIDDEN = ("permission denied", "is a directory", "exec format error")
PORTS = ("port is already allocated", "all ports are allocated", "address already in use")
"""Of a port to publish. The next start of the same container tries another one."""
BINDING = ("bind", "listen", "port", "proxy")
"""Words of a refusal that is about a port."""
SUBNET = ("does not belong to any of this network", "networks with user configured subnets", "no configured subnet")
"""The network is another one than the address was leased on."""
NO_FREEZER = ("freezer not supported", "freezer is not supported", "freezer not mounted", "not implemented")


def clean(text: str, work: Workload) -> str:
    """The text without any value of the workload's environment, without its password, token and control characters."""
    password = [work.image.auth.password] if work.image.auth else []
    token = [work.agent.token] if work.agent else []
    return storable(without(text, [*work.env.values(), *password, *token]))


def is_image_missing(refused: Refused) -> bool:
    """True when a create call needs a fetch first: nothing local, or only another platform's."""
    return refused.status == HTTPStatus.NOT_FOUND and has_any(refused.message, NO_IMAGE)


def create_verdict(work: Workload, refused: Refused) -> RuntimeFault:
    """A create call that was refused for another reason than its name."""
    message = clean(refused.message, work)
    if refused.is_engine_trouble:
        return trouble("create the container", refused, message)
    if is_image_missing(refused):
        return ImageMissing(work.image.reference, message)
    if work.ip and _is_about_network(refused):
        return NetworkMissing("START_FAILED", f"the network of sandboxes is gone or has changed: {message}")
    if refused.status == HTTPStatus.BAD_REQUEST:
        if has_any(message, REFERENCE):
            return RuntimeRejected("IMAGE_REFERENCE_INVALID", message)
        if has_any(message, SPEC):
            return RuntimeRejected("SPEC_REJECTED", message)
    return AttemptFailed("START_FAILED", f"the engine did not create the container: {message}")


def is_about_ports(refused: Refused) -> bool:
    """True when a start call was refused for a port to publish, so that the same call may work at once."""
    return has_any(refused.message, PORTS) and not is_about_address(refused)


def is_about_address(refused: Refused) -> bool:
    """True when a start call was refused for the container's own address. The words are those of a port, without it."""
    return has_any(refused.message, ("address already in use",)) and not has_any(refused.message, BINDING)


def start_verdict(work: Workload, refused: Refused, port_range: str = "") -> RuntimeFault:
    """A start call that was refused. 404 for the container itself and 409 are the caller's to know."""
    message = clean(refused.message, work)
    if work.ip and is_about_address(refused):  # before all others: the engine says it by 403, as a guard would
        return AddressTaken("START_FAILED", f"{work.ip} is taken by something that this server did not make: {message}")
    if work.ip and _is_about_network(refused):
        return NetworkMissing("START_FAILED", f"the network of sandboxes is gone or has changed: {message}")
    if refused.is_engine_trouble:
        return trouble("start the container", refused, message)
    if is_about_ports(refused):
        return _no_port(message, port_range)
    if _is_about_program(work, refused.message):
        if work.agent is not None and has_any(refused.message, ABSENT):
            return AgentMissing("START_FAILED", f"the volume {work.agent.volume} does not hold the agent: {message}")
        if work.agent is not None:
            return AttemptFailed("START_FAILED", f"the engine cannot execute the agent's bootstrap.sh: {message}")
        if has_any(refused.message, ABSENT):
            return RuntimeRejected("ENTRYPOINT_NOT_FOUND", message)
        if has_any(refused.message, FORBIDDEN):
            return RuntimeRejected("ENTRYPOINT_NOT_EXECUTABLE", message)
    if has_any(message, USER) or has_any(message, DEVICE):
        return RuntimeRejected("START_REJECTED", message)
    return AttemptFailed("START_FAILED", f"the engine did not start the container: {message}")


def _is_about_network(refused: Refused) -> bool:
    gone = refused.status == HTTPStatus.NOT_FOUND and has_any(refused.message, ("network",))
    return gone or has_any(refused.message, SUBNET)


def _no_port(message: str, port_range: str) -> RuntimeFault:
    if not port_range:
        return AttemptFailed("PORTS_EXHAUSTED", f"the engine has no free port to publish: {message}")
    advice = "widen docker.port_range_min and docker.port_range_max"
    return AttemptFailed("PORTS_EXHAUSTED", f"range {port_range} is full or taken: {advice} ({message})")


def power_verdict(power: Power, name: str, refused: Refused) -> RuntimeFault:
    """A pause or unpause call that was refused, and the object is as before."""
    verb = {Power.PAUSED: "pause", Power.RUNNING: "resume"}[power]
    if refused.is_engine_trouble:
        return trouble(f"{verb} {name}", refused)
    message = storable(refused.message)
    if has_any(message, NO_FREEZER):
        return RuntimeRejected("PAUSE_NOT_SUPPORTED", f"the engine cannot {verb} containers: {message}")
    return AttemptFailed(f"{verb.upper()}_REFUSED", f"the engine did not {verb} {name}: {message}")


def remove_verdict(name: str, refused: Refused) -> RuntimeFault:
    """A remove call that was refused, and the object is still there."""
    if refused.is_engine_trouble:
        return trouble(f"remove {name}", refused)
    return AttemptFailed("REMOVE_REFUSED", f"the engine did not remove {name}: {storable(refused.message)}")


def without(text: str, secrets: list[str]) -> str:
    """The text without the secrets, as they are and as they stand inside a quoted string."""
    for secret in sorted(secrets, key=len, reverse=True):  # longest first: one may contain another
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, HIDDEN).replace(_quoted(secret), HIDDEN)
    return text


def has_any(text: str, fragments: tuple[str, ...]) -> bool:
    """Whether one of the fragments is in the text, in any case."""
    lowered = text.lower()
    return any(fragment in lowered for fragment in fragments)


def _is_about_program(work: Workload, text: str) -> bool:
    """The runtime names the program that it could not execute. It may be another than the request's: a helper that the
    host lacks, such as a hook of a device driver or the engine's init, is missing for every sandbox.
    """
    executed = program(work)
    return f'exec: "{_quoted(executed)}"' in text or f"executable file `{executed}`" in text


def _quoted(text: str) -> str:
    return msgspec.json.encode(text.encode(errors="replace").decode()).decode()[1:-1]
