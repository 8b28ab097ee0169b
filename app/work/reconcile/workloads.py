"""From a sandbox to what a driver makes: the spec, resolved, with its secrets in the clear.

The only place where sealed values are opened. Env values live in a `Workload` for as long as one `ensure` runs, and
registry credentials in its `Image` for as long as one pull.

Where a spec has secrets and the row with them is gone, the sandbox has ended or failed meanwhile (the append that ends
it erases them), or somebody deleted the row by hand. The caller records the rejection against the version it looked at,
which tells the two apart. A row that does not open is a matter of this worker's key, so it is retried.

Amounts are those that were parsed at the request. "All GPUs" is no amount, so it is read from the spec again.
"""

from __future__ import annotations

import logging
from uuid import UUID

from sqlalchemy import Uuid, bindparam, select

from app.domain.sandbox.observed import Ref
from app.domain.sandbox.quantity import ALL_GPUS
from app.domain.sandbox.spec import parse_limits
from app.domain.sandbox.state import Sandbox
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeRejected, SettingsError
from app.runtime.driver import Image, Limits, RegistryAuth, Workload
from app.runtime.faults import AttemptFailed
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import sealed_values
from app.store.vault.seal import Sealed, Sealer, Secrets, Unsealable
from app.views.snapshots import SnapshotsView
from app.work.agents import Agents

_LOG = logging.getLogger(__name__)
_COLUMNS = sealed_values.c
_SEALED = Statement(
    select(_COLUMNS.key_id, _COLUMNS.wrapped_key, _COLUMNS.sealed).where(
        _COLUMNS.stream_id == bindparam("stream_id", type_=Uuid)
    )
)


def ref_of(sandbox: Sandbox) -> Ref:
    """The object of the engine that belongs to it."""
    assert sandbox.object_id is not None, "a sandbox is placed before an engine is asked about it"
    main = None if sandbox.runtime is None else sandbox.runtime.main
    return Ref(sandbox.object_id, sandbox.place, None if main is None else main.runtime_id)


class Workloads:
    """Makes what a driver needs from a sandbox and its sealed values."""

    def __init__(self, database: Database, sealer: Sealer, agents: Agents | None = None) -> None:
        """`agents` None = sandboxes without an agent."""
        self._database = database
        self._sealer = sealer
        self._agents = agents
        self._snapshots = SnapshotsView(database)

    async def of(self, sandbox: Sandbox, ip: str = "") -> Workload:
        """What to make, with this address on our own network.

        Raises:
            RuntimeRejected: `SECRETS_UNAVAILABLE`, the values are gone; `IMAGE_NOT_FOUND`, the snapshot is.
            AttemptFailed: `SECRETS_SEALED`, this worker cannot open them.
        """
        spec = sandbox.spec
        secrets = await self._secrets(sandbox.id) if spec.env or spec.registry_auth else Secrets()
        image = spec.image if spec.snapshot_id is None else await self._image_of(spec.snapshot_id)
        name, password = secrets.registry_username, secrets.registry_password
        return Workload(
            ref=ref_of(sandbox),
            tenant=sandbox.tenant,
            image=Image(
                image,
                None if spec.platform is None else str(spec.platform),
                None if name is None or password is None else RegistryAuth(name, password),
            ),
            entrypoint=spec.entrypoint,
            env=secrets.env,
            limits=_limits(sandbox),
            # A new object is one more. One that is there already is adopted, and says which it is.
            generation=sandbox.generation + 1,
            position=sandbox.position,
            agent=None if self._agents is None else self._agents.of(sandbox),
            ip=ip,
        )

    async def _image_of(self, snapshot_id: UUID) -> str:
        """By id, which no other image can have."""
        loaded = await self._snapshots.load(snapshot_id, ANY_TENANT)
        image_id = None if loaded is None else loaded[0].image_id
        if image_id is None:
            raise RuntimeRejected("IMAGE_NOT_FOUND", f"snapshot {snapshot_id} has no image")
        return image_id

    async def _secrets(self, sandbox_id: UUID) -> Secrets:
        row = await self._database.fetch_one(_SEALED, stream_id=sandbox_id)
        if row is None:
            raise RuntimeRejected(
                "SECRETS_UNAVAILABLE",
                "the values of env or the registry credentials are not stored any more; create the sandbox again",
            )
        sealed = Sealed(row["key_id"], row["wrapped_key"], row["sealed"])
        try:
            # A rotation may have wrapped the row by a key that came into the key file after this worker started.
            await self._sealer.learn(sealed.key_id)
        except SettingsError as error:
            _LOG.error("%s", error)
        try:
            return self._sealer.unseal(sandbox_id, sealed)
        except Unsealable as error:
            raise AttemptFailed("SECRETS_SEALED", str(error)) from None


def _limits(sandbox: Sandbox) -> Limits:
    gpus_all = parse_limits(sandbox.spec.resource_limits).get("gpu") == ALL_GPUS
    return Limits(sandbox.cpu_nanos, sandbox.memory_bytes, None if gpus_all else sandbox.gpus, gpus_all)
