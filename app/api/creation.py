"""From the request to create to the event that begins a stream: the rules of contract 1.8, in its order.

First shape (422), then what is not served yet (501, by name), then values (400). Secrets leave here in a `Secrets`
that only the sealer sees; the event has names and keyed digests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import UUID

import msgspec
import uuid_utils.compat

from app.api.call import Call, uuid_in
from app.api.context import ApiContext
from app.api.errors import INVALID_HEADER, INVALID_PARAMETER, Issue, Problem, malformed
from app.api.image import check_image
from app.api.sandbox_wire import CreateSandbox
from app.domain.sandbox.events import Requested
from app.domain.sandbox.spec import (
    ALL_GPUS,
    RESTORED_EXTENSION_PREFIX,
    Platform,
    SandboxSpec,
    check_metadata,
    check_platform,
    check_timeout,
    parse_limits,
)
from app.domain.snapshot.decide import unknown
from app.errors import Invalid, KeyRetired, KeyReused, NotFound, SettingsError, Unsupported
from app.service.sandboxes import Outcome
from app.store.vault.rotation import notice_master_key
from app.store.vault.seal import Secrets

_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")
_RESERVED_ENV = "OPENSANDBOX_LIFECYCLE"
_AGENT_ENV = ("EXECD", "EXECD_ACCESS_TOKEN", "EXECD_ENVS", "EXECD_INIT", "OPENSANDBOX_ID")
"""What the agent's bootstrap reads and this server decides. With a value of the client's own the sandbox would have no
agent, or one that does not ask for the token. `EXECD_BOOTSTRAP_PRE_SCRIPT` is the client's."""
_POOL = "poolRef"
_RENEW = "access.renew.extend.seconds"
_ISOLATION = "bootstrap.execd.isolation"
_RENEW_BOUNDS = (300, 86400)
_RESTORED_ENTRYPOINT = ("tail", "-f", "/dev/null")
"""Of a sandbox that is made from a snapshot, when the request has none."""
_MAX_STRING_BYTES = 128 * 1024 - 1
"""Of one argument or of one `NAME=value` (Linux's MAX_ARG_STRLEN, less the NUL). A container that is given more starts,
and its first program dies of "argument list too long", which no engine reports."""


def check_shape(request: CreateSandbox) -> None:
    """The rules that span fields.

    Raises:
        Problem: 422 with every rule that is broken.
    """
    issues = tuple(_issues(request))
    if issues:
        raise malformed(*issues)


def _issues(request: CreateSandbox) -> Iterator[Issue]:
    yield from _env_issues(request.env or {})
    extensions = request.extensions or {}
    if _given(request.template_id):
        yield from _template_issues(request)
        return
    if _given(extensions.get(_POOL)):
        for name, value in (("lifecycle", request.lifecycle), ("snapshotId", request.snapshot_id)):
            if value is not None:
                yield _issue(name, "must not stand beside extensions.poolRef")
        return
    if request.credential_proxy is not None and request.credential_proxy.enabled and request.network_policy is None:
        yield _issue("credentialProxy", "needs networkPolicy")
    has_image = request.image is not None and _given(request.image.uri)
    if has_image == _given(request.snapshot_id):
        yield _issue("image", "exactly one of image and snapshotId is required")
    if has_image and request.entrypoint is None:
        yield _issue("entrypoint", "is required with image", "missing")
    if request.resource_limits is None:
        yield _issue("resourceLimits", "is required", "missing")


def _env_issues(env: dict[str, str | None]) -> Iterator[Issue]:
    if _RESERVED_ENV in env:
        yield _issue("env", f"{_RESERVED_ENV} is reserved")
    if any(not name or "=" in name for name in env):
        yield _issue("env", "names must be non-empty and without =")


def _template_issues(request: CreateSandbox) -> Iterator[Issue]:
    beside = {
        "image": request.image,
        "snapshotId": request.snapshot_id,
        "entrypoint": request.entrypoint,
        "env": request.env,
        "resourceLimits": request.resource_limits,
        "resourceRequests": request.resource_requests,
        "volumes": request.volumes,
        "platform": request.platform,
        "credentialProxy": request.credential_proxy,
        "secureAccess": request.secure_access or None,
        "lifecycle": request.lifecycle,
    }
    for name, value in beside.items():
        if value is not None:
            yield _issue(name, "must not stand beside templateId")
    if request.timeout is None:
        yield _issue("timeout", "is required with templateId", "missing")


def _issue(name: str, rule: str, kind: str = "value_error") -> Issue:
    return Issue(("body", name), rule, kind)


def _given(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def check_served(request: CreateSandbox) -> None:
    """Refuse by name what is not served yet; accepting it would promise what nobody keeps.

    Raises:
        Unsupported: the field.
        Invalid: a value that the contract does not allow either.
    """
    extensions = request.extensions or {}
    renew = extensions.get(_RENEW)
    if renew is not None and not _within(renew, *_RENEW_BOUNDS):
        raise Invalid(INVALID_PARAMETER, f"extensions.{_RENEW} must be a whole number from 300 to 86400.")
    asked = {
        "templateId": _given(request.template_id),
        f"extensions.{_POOL}": _given(extensions.get(_POOL)),
        f"extensions.{_RENEW}": renew is not None,
        f"extensions.{_ISOLATION}": _given(extensions.get(_ISOLATION)),
        "lifecycle": request.lifecycle is not None,
        "secureAccess": bool(request.secure_access),
        "networkPolicy": request.network_policy is not None,
        "credentialProxy": request.credential_proxy is not None and request.credential_proxy.enabled,
        "volumes": bool(request.volumes),
    }
    for name, wanted in asked.items():
        if wanted:
            raise Unsupported("SANDBOX::API_NOT_SUPPORTED", f"{name} is not served yet.")


def _within(text: str, low: int, high: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high


def _check_values(
    request: CreateSandbox, image: str | None, entrypoint: list[str], context: ApiContext
) -> Platform | None:
    """In the contract's order. Gives the platform in its normal spelling. `image` None = it is made from a snapshot."""
    if not entrypoint[0].strip():
        raise Invalid("DOCKER::INVALID_ENTRYPOINT", "entrypoint must begin with a program.")
    metadata, most = request.metadata or {}, context.metadata_max_entries
    if most is not None and len(metadata) > most:
        raise Invalid(INVALID_PARAMETER, f"metadata may hold at most {most} entries.")
    check_metadata(metadata)
    asked = request.platform
    platform = None if asked is None else check_platform(Platform(asked.os, asked.arch))
    check_timeout(request.timeout, context.max_sandbox_timeout_seconds)
    if image is not None:
        check_image(image)
    _check_strings(entrypoint, request.env or {})
    if context.endpoints.network.agent:
        _check_agent_env(request.env or {})
    return platform


def _check_agent_env(env: dict[str, str | None]) -> None:
    for name in _AGENT_ENV:
        if env.get(name) is not None:
            raise Invalid(INVALID_PARAMETER, f"env.{name} is set by the server for the agent. Leave it out.")


def _check_strings(entrypoint: list[str], env: dict[str, str | None]) -> None:
    if any(len(argument.encode()) > _MAX_STRING_BYTES for argument in entrypoint):
        raise Invalid(INVALID_PARAMETER, f"An element of entrypoint may have at most {_MAX_STRING_BYTES} bytes.")
    if any(len(f"{name}={value}".encode()) > _MAX_STRING_BYTES for name, value in env.items() if value is not None):
        raise Invalid(INVALID_PARAMETER, f"An entry of env, NAME=value, may have at most {_MAX_STRING_BYTES} bytes.")


def _snapshot_of(text: str) -> UUID:
    found = uuid_in(text.strip())
    if found is None:
        raise NotFound(unknown("").code, "Snapshot ids are UUIDs; there is no snapshot with the id in snapshotId.")
    return found


async def _check_snapshot(request: CreateSandbox, tenant: str, context: ApiContext) -> None:
    """Before the values, as in the contract. The append holds the snapshot and looks again.

    Raises:
        NotFound, Conflict: it is not there or cannot be used.
    """
    check_shape(request)
    check_served(request)
    if _given(request.snapshot_id):
        await context.service.snapshots.restorable(_snapshot_of(request.snapshot_id or ""), tenant)


def accept(request: CreateSandbox, sandbox_id: UUID, context: ApiContext) -> tuple[Requested, Secrets | None]:
    """The first event, and what is to be sealed.

    Raises:
        Problem, Rejected: a rule is broken; nothing has been written.
    """
    check_shape(request)
    check_served(request)
    image = None if _given(request.snapshot_id) else request.image
    snapshot_id = None if image is not None else _snapshot_of(request.snapshot_id or "")
    entrypoint = request.entrypoint or list(_RESTORED_ENTRYPOINT)
    platform = _check_values(request, None if image is None else image.uri, entrypoint, context)
    env = {name: value for name, value in (request.env or {}).items() if value is not None}
    digest = context.sealer.digest
    spec = SandboxSpec(
        image="" if image is None else image.uri,
        snapshot_id=snapshot_id,
        entrypoint=tuple(entrypoint),
        resource_limits=request.resource_limits or {},
        resource_requests=request.resource_requests or {},
        env={name: digest(value.encode(), f"env/{sandbox_id}/{name}") for name, value in env.items()},
        registry_auth=image is not None and image.auth is not None,
        platform=platform,
        extensions={k: v for k, v in (request.extensions or {}).items() if k.startswith(RESTORED_EXTENSION_PREFIX)},
    )
    limits = context.bounds.apply(parse_limits(spec.resource_limits))
    gpus = limits.get("gpu")
    event = Requested(
        spec,
        digest(msgspec.json.encode(request, order="sorted"), "request"),
        request.metadata or {},
        request.timeout,
        cpu_nanos=limits.get("cpu"),
        memory_bytes=limits.get("memory"),
        gpus=None if gpus == ALL_GPUS else gpus,
        gpus_all=gpus == ALL_GPUS,
    )
    login = None if image is None else image.auth
    if not env and login is None:
        return event, None
    return event, Secrets(env, login and login.username, login and login.password)


async def begin(context: ApiContext, call: Call, request: CreateSandbox, idempotency_key: str | None) -> Outcome:
    """Accept a create: the only place of this package that calls `service.create`.

    Raises:
        Problem, Rejected: a rule is broken, or the key came with another body.
        KeyRetired: the master key in use is not to be had here.
    """
    if idempotency_key is not None and not _VISIBLE.fullmatch(idempotency_key):
        raise Problem(400, INVALID_HEADER, "Idempotency-Key must be 1 to 255 visible ASCII characters.")
    sandbox_id = uuid_utils.compat.uuid7()
    if idempotency_key is None:  # with a key, what the first request made is answered whatever became of the snapshot
        await _check_snapshot(request, call.who.tenant, context)
    event, secrets = accept(request, sandbox_id, context)
    meta = call.meta(idempotency_key)

    async def attempt() -> Outcome:
        sealed = None if secrets is None else context.sealer.seal(sandbox_id, secrets)
        return await context.service.create(sandbox_id, call.who.tenant, event, sealed, meta, key=meta.idempotency_key)

    try:
        try:
            return await attempt()
        except KeyRetired as error:
            await _notice_master_key(context, error)
            return await attempt()
    except KeyReused as error:
        call.sandbox_id = error.stream_id
        raise


async def _notice_master_key(context: ApiContext, retired: KeyRetired) -> None:
    """A rotation has ended since this server last asked which master key is in use; nothing has been written."""
    try:
        await notice_master_key(context.database, context.sealer)
    except SettingsError as error:
        raise KeyRetired(f"{retired}; {error}") from None
