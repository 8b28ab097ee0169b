"""One connection to PostgreSQL, opened as the application role and checked before anybody uses it.

**Who.** Servers log in as a member of the application role and take that role in the start packet, so that no statement
can forget it and `RESET ROLE` leads back to it. The role's name is of this database alone (`installation.app_role`), so
the first connection asks for it.

**What is pinned**, against defaults of the database and against objects that shadow ours: the search path (`pg_temp`
last, because PostgreSQL otherwise looks there first for tables, whether or not it is named), isolation, time zone, and
`synchronous_commit`, because an answer means that it is on disk.

**What is checked.** A pooler in between drops settings of the start packet without an error, when it is configured to
ignore them. So each new connection is asked what is in force. A wrong answer refuses the start and says which
statements make the same settings at the server, where a pooler cannot drop them.

**Several hosts** are tried one by one, each with its own time limit: with one limit for all, a first host that swallows
packets would use it up.

Failure: StoreUnavailable for a server that does not answer, StoreRefused where waiting does not help.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast

import asyncpg
from asyncpg import exceptions as pg
from msgspec import Struct

from app.errors import SettingsError, StoreRefused, StoreUnavailable
from app.store.database.dsn import Address, address

SEARCH_PATH = "pg_catalog, sandledger, pg_temp"
PINNED = {
    "search_path": SEARCH_PATH,
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "TimeZone": "UTC",
    # Ends a stuck writer, which would otherwise hold back every reader of the log.
    "idle_in_transaction_session_timeout": "5s",
}
SESSION = {
    "application_name": "sandledger",
    "jit": "off",
    **PINNED,
}
GONE = (
    OSError,
    asyncio.TimeoutError,
    pg.PostgresConnectionError,
    pg.InterfaceError,
    pg.InternalClientError,
    pg.OperatorInterventionError,  # shutting down, starting up, killed
    pg.InsufficientResourcesError,  # disk full, too many connections
    pg.IdleInTransactionSessionTimeoutError,
    pg.ReadOnlySQLTransactionError,  # a standby since the last failover
)
"""Errors of a statement after which nobody knows what became of it, or which another server would not give."""
SCHEMA_MISSING = (pg.UndefinedTableError, pg.InvalidSchemaNameError)
"""Errors of a statement whose table or schema is not there (any more). It is always ours, because statements qualify
all names. Told by the code: PostgreSQL translates its texts.
"""
_FINAL = (
    pg.InvalidAuthorizationSpecificationError,  # and a wrong password, its child
    pg.InvalidCatalogNameError,
    pg.InsufficientPrivilegeError,
    pg.InvalidParameterValueError,
    pg.ProtocolViolationError,
    pg.UndefinedObjectError,
)
_ROLE = """
SELECT i.app_role FROM sandledger.installation AS i
"""
GRANTED = """
SELECT r.rolname
  FROM pg_catalog.pg_class AS c
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = 'sandledger'
 CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) AS a
  JOIN pg_catalog.pg_roles AS r ON r.oid = a.grantee
 WHERE c.relname = 'reconcile_queue' AND a.privilege_type = 'DELETE' AND a.grantee <> c.relowner
"""
"""Who has the application's privileges, whatever `installation` says."""
_CHECK = """
SELECT current_user AS role, session_user AS login, r.rolsuper AS superuser,
       pg_catalog.pg_has_role(session_user, n.nspowner, 'MEMBER') AS owner,
       pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS usable,
       pg_catalog.current_setting('search_path') AS search_path,
       pg_catalog.current_setting('default_transaction_isolation') AS default_transaction_isolation,
       pg_catalog.current_setting('synchronous_commit') AS synchronous_commit,
       pg_catalog.current_setting('TimeZone') AS "TimeZone",
       pg_catalog.current_setting('idle_in_transaction_session_timeout') AS idle_in_transaction_session_timeout
  FROM pg_catalog.pg_namespace AS n, pg_catalog.pg_roles AS r
 WHERE n.nspname = 'sandledger' AND r.rolname = session_user
"""


class Login(Struct, frozen=True):
    """The login of this server, and what it may do."""

    name: str
    role: str
    """The application role of this database."""
    superuser: bool
    owner: bool
    """It may become the owner of the tables."""

    @property
    def warning(self) -> str | None:
        """What is wrong with a login that could undo what the role forbids."""
        if not (self.superuser or self.owner):
            return None
        what = "a superuser" if self.superuser else "the owner of the tables"
        return (
            f"the database login {self.name} is {what}: an attacker who takes over this server could rewrite the log. "
            f"Make a login of its own (CREATE ROLE sandledger_server LOGIN PASSWORD '...'; GRANT {self.role} TO "
            "sandledger_server), put it into store.postgresql.dsn and this one into store.postgresql.migrate_dsn"
        )


async def dial(target: Address, limit: float, settings: dict[str, str], **options: Any) -> Any:
    """A bare connection to the first host that will do.

    Raises:
        StoreUnavailable, StoreRefused, SettingsError: as `explained` tells them apart.
    """
    session = {**settings, **target.session, **{name: settings[name] for name in PINNED.keys() & settings.keys()}}
    if "role" in settings:
        session["role"] = settings["role"]
    last: BaseException | None = None
    for attrs in target.attempts:
        for host in target.hosts:
            try:
                return await cast("Any", asyncpg).connect(
                    host,
                    timeout=target.timeout or limit,
                    server_settings=session,
                    target_session_attrs=attrs,
                    **({} if target.tls is None else {"ssl": target.tls}),
                    **options,
                )
            except (*GONE, pg.PostgresError, ValueError) as error:
                last = error
                if _final(error):
                    break
    raise explained(cast("BaseException", last)) from last


def _final(error: BaseException) -> bool:
    """Whether no other host and no later time would change it."""
    return isinstance(error, (*_FINAL, pg.ClientConfigurationError, ValueError)) or _broken_file(error)


def _broken_file(error: BaseException) -> bool:
    """A certificate or key that cannot be read or does not check out. Sockets that are not there do not count."""
    return isinstance(error, ssl.SSLError | IsADirectoryError)


def explained(error: BaseException) -> StoreUnavailable | SettingsError:
    """Our word for an error of the driver or the server. Its texts name no value of ours."""
    if isinstance(error, pg.TargetServerAttributeNotMatched):
        return StoreUnavailable("no PostgreSQL of the DSN is what target_session_attrs asks for")
    if isinstance(error, ssl.SSLError):
        return StoreRefused(f"PostgreSQL's TLS is not accepted: {error.reason or type(error).__name__}")
    if isinstance(error, pg.ProtocolViolationError) and "startup parameter" in str(error):
        return StoreRefused(
            f"the pooler in front of PostgreSQL refuses: {error}. Add it to ignore_startup_parameters, and give the "
            "login its settings at the server; README, Poolers, has the lines"
        )
    if isinstance(error, _FINAL):
        return StoreRefused(f"PostgreSQL refuses: {error}")
    if isinstance(error, pg.ClientConfigurationError | ValueError):
        return SettingsError("the PostgreSQL DSN has a value that the driver does not take; check its keys one by one")
    if isinstance(error, pg.PostgresError):
        return StoreUnavailable(f"PostgreSQL is not reachable: {error}")
    said = getattr(error, "strerror", None) or type(error).__name__
    return StoreUnavailable(f"PostgreSQL is not reachable: {said}")


class Connector:
    """Opens the connections of one process."""

    def __init__(self, dsn: str, *, connect_timeout: float, command_timeout: float) -> None:
        """Reads the DSN, connects to nothing."""
        self._address = address(dsn)
        self._limit = connect_timeout
        self._command_timeout = command_timeout
        self._learning = asyncio.Lock()
        self._role: str | None = None
        self.login: Login | None = None
        """Known after the first connection."""

    async def open(self, _dsn: None = None, **options: Any) -> Any:
        """A checked connection. `options` are asyncpg's."""
        role = self._role or await self._learn()
        try:
            return await self._open(role, options)
        except StoreRefused:
            # The schema may have been made again, for another role, and the old one dropped or not granted. After any
            # other failure the role is kept: those who learn it take turns, and in an outage each turn is a timeout.
            self._role = None
            raise

    async def _open(self, role: str, options: dict[str, Any]) -> Any:
        settings = {**SESSION, "role": role}
        driver = await dial(self._address, self._limit, settings, command_timeout=self._command_timeout, **options)
        try:
            self.login = await _checked(driver, role)
        except BaseException as error:
            driver.terminate()
            if isinstance(error, GONE):
                raise explained(error) from error
            raise
        return driver

    async def knock(self) -> None:
        """See whether a new connection is let in. Raises as `dial` does."""
        driver = await dial(self._address, self._limit, {"application_name": "sandledger"})
        await driver.close(timeout=self._limit)

    async def why_denied(self) -> StoreRefused | None:
        """Why the role of this process may not use the schema (any more). None = it may, so the statement that was
        denied asked for too much. On a new connection, because a denied statement ends a transaction, and because the
        check is the one of every new connection.

        Raises:
            StoreUnavailable: PostgreSQL went away meanwhile.
        """
        try:
            driver = await self.open()
        except StoreRefused as error:
            return error
        driver.terminate()
        return None

    async def _learn(self) -> str:
        async with self._learning:
            if self._role is None:
                driver = await dial(self._address, self._limit, SESSION, command_timeout=self._command_timeout)
                try:
                    self._role = await _role_of(driver)
                except GONE as error:
                    raise explained(error) from error
                finally:
                    driver.terminate()
            return self._role


async def _role_of(driver: Any) -> str:
    try:
        return await driver.fetchval(_ROLE)
    except (pg.UndefinedTableError, pg.InvalidSchemaNameError, pg.UndefinedColumnError):
        raise StoreRefused("this database has no schema of this version; run `sandledger migrate`") from None
    except pg.InsufficientPrivilegeError:
        login, role = await driver.fetchval("SELECT session_user"), await driver.fetchval(GRANTED)
        if role is None:  # a schema that is being made at this moment: nobody has been granted anything yet
            raise StoreRefused("this database has no schema of this version; run `sandledger migrate`") from None
        raise StoreRefused(
            f"the database login {login} is not a member of the application role: GRANT {role} TO {login}"
        ) from None


async def _checked(driver: Any, role: str) -> Login:
    row = await driver.fetchrow(_CHECK)
    if row is None:
        raise StoreRefused("this database has no schema of this version; run `sandledger migrate`")
    wrong = [name for name, wanted in PINNED.items() if not _in_force(name, row[name], wanted)]
    if row["role"] != role:
        wrong.append("role")
    if wrong:
        settings = {**PINNED, "role": role}
        lines = "; ".join(
            f"ALTER ROLE {row['login']} IN DATABASE ... SET {name} = {_literal(name, settings[name])}" for name in wrong
        )
        raise StoreRefused(
            f"settings of this connection are not in force ({', '.join(wrong)}), as behind a pooler that ignores them. "
            f"Connect without it, or make them the login's own: {lines}"
        )
    if not row["usable"]:
        raise StoreRefused(f"the role {role} may not use the schema sandledger; it was made again for another role")
    return Login(row["login"], role, row["superuser"], row["owner"])


def _in_force(name: str, found: str, wanted: str) -> bool:
    # A standby that has applied it is more than was asked for.
    return found == wanted or (name == "synchronous_commit" and found == "remote_apply")


def _literal(name: str, value: str) -> str:
    """As SQL. A search path is a list of names, not one name in quotes."""
    return value if name == "search_path" else f"'{value}'"
