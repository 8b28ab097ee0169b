"""From a sandbox to what a driver makes: the spec, resolved, with its secrets in the clear.

The only place where sealed values are opened. They live in a `Workload` for as long as one `ensure` runs.

Where a spec has secrets and the row with them is gone, the sandbox has ended or failed meanwhile (the append that ends
it erases them), or somebody deleted the row by hand. The caller records the rejection against the version it looked at,
which tells the two apart. A row that does not open is a matter of this worker's key, so it is retried.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Uuid, bindparam, select

from app.domain.sandbox.spec import parse_limits
from app.domain.sandbox.state import Sandbox
from app.errors import RuntimeRejected
from app.runtime.driver import Limits, RegistryAuth, Workload
from app.runtime.faults import AttemptFailed
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import sandbox_secrets
from app.store.vault.seal import Sealed, Sealer, Secrets, Unsealable

_S = sandbox_secrets.c
_SEALED = Statement(
    select(_S.key_id, _S.wrapped_key, _S.sealed).where(_S.sandbox_id == bindparam("sandbox_id", type_=Uuid))
)


class Workloads:
    """Makes workloads."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer

    async def of(self, box: Sandbox) -> Workload:
        """What to make.

        Raises:
            RuntimeRejected: `SECRETS_UNAVAILABLE`, the values are gone.
            AttemptFailed: `SECRETS_SEALED`, this worker cannot open them.
        """
        spec = box.spec
        secrets = await self._secrets(box.id) if spec.env or spec.registry_auth else Secrets()
        limits = parse_limits(spec.resource_limits)
        name, password = secrets.registry_username, secrets.registry_password
        return Workload(
            sandbox_id=box.id,
            tenant=box.tenant,
            image=spec.image,
            entrypoint=spec.entrypoint,
            env=secrets.env,
            limits=Limits(limits.get("cpu"), limits.get("memory"), limits.get("gpu")),
            platform=None if spec.platform is None else str(spec.platform),
            auth=None if name is None or password is None else RegistryAuth(name, password),
            generation=1 if box.runtime is None else box.runtime.generation,
        )

    async def _secrets(self, sandbox_id: UUID) -> Secrets:
        row = await self._database.fetch_one(_SEALED, sandbox_id=sandbox_id)
        if row is None:
            raise RuntimeRejected(
                "SECRETS_UNAVAILABLE",
                "the values of env or the registry credentials are not stored any more; create the sandbox again",
            )
        try:
            return self._sealer.unseal(sandbox_id, Sealed(row["key_id"], row["wrapped_key"], row["sealed"]))
        except Unsealable as error:
            raise AttemptFailed("SECRETS_SEALED", str(error)) from None
