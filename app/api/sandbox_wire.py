"""Sandboxes on the wire (contract 1.6 to 1.10): what is decoded, what is encoded, and the way from state to wire.

camelCase. Absent is absent, never null: an optional answer field is `UNSET`, which msgspec leaves out. Litestar makes
the OpenAPI document from these structs. Parts of a request that are not served yet are typed as loosely as they are
checked. `sandbox_body` and `created_body` are the only places where a state becomes a body.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from app.domain.sandbox.state import Sandbox
from app.domain.sandbox.status import Attempt, status_of
from app.domain.text import printable

Instant: TypeAlias = Annotated[datetime, Meta(tz=True, description="RFC 3339, UTC.")]
Loose: TypeAlias = dict[str, Any]
_CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)


class RegistryLogin(Struct, frozen=True):
    """Credentials of the image's registry. Sealed; never returned."""

    username: str
    password: str


class ImageRequest(Struct, frozen=True, omit_defaults=True):
    """Which image. A blank uri counts as absent."""

    uri: str
    auth: RegistryLogin | None = None


class PlatformBody(Struct, frozen=True):
    """`linux` and `amd64` or `arm64`."""

    os: str
    arch: str


class CredentialProxy(Struct, frozen=True, omit_defaults=True):
    """Not served yet."""

    enabled: bool = False


class CreateSandbox(Struct, frozen=True, rename="camel", omit_defaults=True):
    """What to create. Field names are also taken in snake_case; unknown fields are ignored."""

    # `omit_defaults`: the fingerprint of an Idempotency-Key is made of this. A field that a later version adds must not
    # turn a repeated request into another one.

    image: ImageRequest | None = None
    snapshot_id: str | None = None
    template_id: Annotated[str, Meta(min_length=1)] | None = None
    platform: PlatformBody | None = None
    timeout: (
        Annotated[int, Meta(ge=60, description="Seconds until it ends; absent or null: never by itself.")] | None
    ) = None
    resource_limits: dict[str, str] | None = None
    resource_requests: dict[str, str] | None = None
    entrypoint: Annotated[list[str], Meta(min_length=1)] | None = None
    env: dict[str, str | None] | None = None
    metadata: dict[str, str] | None = None
    lifecycle: Loose | None = None
    network_policy: Loose | None = None
    credential_proxy: CredentialProxy | None = None
    secure_access: bool | None = None
    volumes: list[Loose] | None = None
    extensions: dict[str, str] | None = None

    @classmethod
    def example(cls) -> CreateSandbox:
        """For the document."""
        return cls(
            image=ImageRequest("python:3.12"),
            entrypoint=["python", "-m", "http.server", "8000"],
            timeout=3600,
            resource_limits={"cpu": "500m", "memory": "512Mi"},
            env={"LANG": "C.UTF-8"},
            metadata={"team": "a"},
        )

    def __repr__(self) -> str:
        """Keep env values and credentials out of tracebacks."""
        return "CreateSandbox(...)"


class RenewExpiration(Struct, frozen=True, rename="camel"):
    """The new end, shorter or longer than the present one."""

    expires_at: (
        Annotated[
            datetime,
            Meta(extra_json_schema={"format": "date-time"}, description="RFC 3339; without an offset it is UTC."),
        ]
        | int
        | float
    )


MetadataPatch: TypeAlias = dict[str, str | None]
"""Merge patch of depth one (RFC 7396): null removes."""


class StatusBody(Struct, frozen=True, rename="camel"):
    """One of Pending, Running, Pausing, Paused, Resuming, Stopping, Terminated, Failed; and why."""

    state: str
    reason: str
    message: str
    last_transition_at: Instant

    @classmethod
    def example(cls) -> StatusBody:
        """For the document."""
        return cls("Running", "CONTAINER_RUNNING", "Sandbox is running.", _CREATED)


class ImageBody(Struct, frozen=True):
    """Never with credentials."""

    uri: str


class CreatedSandbox(Struct, frozen=True, rename="camel"):
    """The answer to a create."""

    id: str
    status: StatusBody
    entrypoint: tuple[str, ...]
    created_at: Instant
    expires_at: Instant | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    extensions: dict[str, str] | UnsetType = UNSET
    platform: PlatformBody | UnsetType = UNSET


class SandboxBody(Struct, frozen=True, rename="camel"):
    """A sandbox."""

    id: str
    status: StatusBody
    entrypoint: tuple[str, ...]
    created_at: Instant
    image: ImageBody | UnsetType = UNSET
    """Absent when it was made from a snapshot."""
    snapshot_id: str | UnsetType = UNSET
    """The snapshot that it was made from."""
    expires_at: Instant | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    extensions: dict[str, str] | UnsetType = UNSET
    platform: PlatformBody | UnsetType = UNSET

    @classmethod
    def example(cls) -> SandboxBody:
        """For the document."""
        asked = CreateSandbox.example()
        return cls(
            id="0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b",
            image=ImageBody("python:3.12"),
            status=StatusBody.example(),
            entrypoint=tuple(asked.entrypoint or ()),
            created_at=_CREATED,
            expires_at=_CREATED + timedelta(hours=1),
            metadata=asked.metadata or UNSET,
        )


class Pagination(Struct, frozen=True, rename="camel"):
    """Where this page lies."""

    page: int
    page_size: int
    total_items: int
    total_pages: int
    has_next_page: bool
    total_is_lower_bound: bool | UnsetType = UNSET
    """There are more than `totalItems`; nobody counted how many. Absent when it is exact."""


class SandboxList(Struct, frozen=True, rename="camel"):
    """A page, newest first."""

    items: tuple[SandboxBody, ...]
    pagination: Pagination
    next_cursor: str | UnsetType = UNSET
    """Give it back as `cursor` for the next page; absent on the last."""


def status_body(sandbox: Sandbox, attempt: Attempt | None) -> StatusBody:
    """As clients see it. The message may repeat what an engine said."""
    status = status_of(sandbox, attempt)
    return StatusBody(status.state.value, status.reason, printable(status.message), status.last_transition_at)


def _shared(sandbox: Sandbox, attempt: Attempt | None) -> tuple[Any, ...]:
    spec = sandbox.spec
    return (
        status_body(sandbox, attempt),
        spec.entrypoint,
        sandbox.created_at,
        UNSET if sandbox.expires_at is None else sandbox.expires_at,
        sandbox.metadata or UNSET,
        spec.extensions or UNSET,
        UNSET if spec.platform is None else PlatformBody(spec.platform.os, spec.platform.arch),
    )


def created_body(sandbox: Sandbox, attempt: Attempt | None = None) -> CreatedSandbox:
    """The create answer has no image (contract 1.8)."""
    return CreatedSandbox(str(sandbox.id), *_shared(sandbox, attempt))


def sandbox_body(sandbox: Sandbox, attempt: Attempt | None = None) -> SandboxBody:
    """Everywhere else. `attempt` is how the queue stands about a Pending sandbox."""
    status, entrypoint, created_at, *rest = _shared(sandbox, attempt)
    spec = sandbox.spec
    image = UNSET if spec.snapshot_id is not None else ImageBody(spec.image)
    snapshot_id = UNSET if spec.snapshot_id is None else str(spec.snapshot_id)
    return SandboxBody(str(sandbox.id), status, entrypoint, created_at, image, snapshot_id, *rest)
