"""Sealing: AES-256-GCM (NIST SP 800-38D), one data key a stream, wrapped by a master key.

A master key is 32 bytes from the environment or a file. A server may have several: one wraps, the others only open what
they wrapped. Which one wraps is the database's word (`installation.master_key_id`), the same for every server; a server
that does not have that key does not start. From a master key the wrapping key is derived (HKDF, RFC 5869). The keys of
digests and tokens are random and wrapped like a data key (`app.store.vault.keys`), so that a rotation changes none.

**Rotation** (`app.store.vault.rotation`) wraps every data key by another master key. When it is done the old master key
can be destroyed, which makes older backups unreadable. Until then, values in a backup open with the master key of their
time: erasing a row does not reach into backups.

The stream's id is bound as associated data, so a sealed row that is copied to another stream does not open.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Callable
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Struct

from app.errors import SandledgerError, SettingsError

_KEY_BYTES = 32
_NONCE_BYTES = 12


class Secrets(Struct, frozen=True, omit_defaults=True):
    """The values of one stream, in the clear. Lives only between request and seal, and between unseal and engine."""

    env: dict[str, str] = {}
    registry_username: str | None = None
    registry_password: str | None = None

    def __repr__(self) -> str:
        """Show names only, never values."""
        return f"Secrets(env={sorted(self.env)})"


class Sealed(Struct, frozen=True):
    """A row of `sealed_values`, as it is stored."""

    key_id: str
    wrapped_key: bytes
    sealed: bytes


class Unsealable(SandledgerError):
    """A sealed row does not open: this server lacks the master key, or somebody changed the row."""


class MasterKeys:
    """The master keys of this server. Holds derived keys, never prints them."""

    def __init__(self, first: bytes, *others: bytes) -> None:
        """Each from 32 bytes of key material. `first` is the one that the operator wants to be used."""
        self._wrapping: dict[str, AESGCM] = {}
        for material in (first, *others):
            if len(material) != _KEY_BYTES:
                raise SettingsError(f"a master key must be {_KEY_BYTES} bytes, base64; got {len(material)}")
            self._wrapping[_derive(material, b"id")[:8].hex()] = AESGCM(_derive(material, b"wrap"))

    @property
    def ids(self) -> tuple[str, ...]:
        """Digests that name the keys, the wanted one first."""
        return tuple(self._wrapping)

    def add(self, others: MasterKeys) -> None:
        """Have those keys too. None is forgotten: rows may still be wrapped by a key that nobody offers any more."""
        self._wrapping = others._wrapping | self._wrapping

    def wrap(self, key_id: str, clear: bytes, bound: bytes) -> bytes:
        """Wrap a data key by the master key."""
        return _encrypt(self._wrapping[key_id], clear, bound)

    def unwrap(self, key_id: str, wrapped: bytes, bound: bytes) -> bytes:
        """The key again.

        Raises:
            Unsealable: that master key is not here, or somebody changed what it wrapped.
        """
        key = self._wrapping.get(key_id)
        try:
            if key is not None:
                return _decrypt(key, wrapped, bound)
        except (InvalidTag, ValueError):
            pass
        raise Unsealable(f"it was sealed by master key {key_id}, this server has {', '.join(self.ids)}")


class Sealer:
    """Seals and unseals the values of streams, and makes keyed digests. One per process."""

    def __init__(
        self,
        master: MasterKeys | bytes,
        digesting: bytes | None = None,
        *,
        key_id: str | None = None,
        reread: Callable[[], MasterKeys] | None = None,
    ) -> None:
        """With the installation's key of digests. `key_id` names the master key that wraps; by default the first.

        `reread` reads the master keys again from where they came, blocking. None = there is nowhere to look.
        """
        self._master = MasterKeys(master) if isinstance(master, bytes) else master
        self._reread = reread
        self._digesting = digesting or os.urandom(_KEY_BYTES)
        self.key_id = key_id or self._master.ids[0]

    @property
    def known_key_ids(self) -> tuple[str, ...]:
        """The master keys that open here."""
        return self._master.ids

    async def learn(self, key_id: str) -> None:
        """Look for this master key where the keys came from, unless it is here: a rotation puts it there meanwhile.

        Raises:
            SettingsError: that place cannot be read.
        """
        if key_id not in self._master.ids and self._reread is not None:
            self._master.add(await asyncio.to_thread(self._reread))

    def use(self, key_id: str) -> None:
        """Wrap by this master key from now on.

        Raises:
            SettingsError: it is not here.
        """
        if key_id not in self._master.ids:
            raise SettingsError(
                f"the database is sealed by master key {key_id}, which this server does not have; give it that key, in "
                "SANDLEDGER_MASTER_KEY or [sandledger] master_key_file"
            )
        self.key_id = key_id

    def seal(self, stream_id: UUID, secrets: Secrets) -> Sealed:
        """Encrypt under a fresh data key, and wrap that."""
        data_key = AESGCM.generate_key(256)
        bound = stream_id.bytes
        key_id = self.key_id
        wrapped = self._master.wrap(key_id, data_key, bound)
        return Sealed(key_id, wrapped, _encrypt(AESGCM(data_key), msgspec.json.encode(secrets), bound))

    def unseal(self, stream_id: UUID, sealed: Sealed) -> Secrets:
        """The values again.

        Raises:
            Unsealable: says which key sealed it.
        """
        bound = stream_id.bytes
        try:
            data_key = self._master.unwrap(sealed.key_id, sealed.wrapped_key, bound)
            return msgspec.json.decode(_decrypt(AESGCM(data_key), sealed.sealed, bound), type=Secrets)
        except (InvalidTag, ValueError):
            raise Unsealable(f"the secrets of {stream_id} do not open: somebody changed them") from None
        except Unsealable as error:
            raise Unsealable(f"the secrets of {stream_id} do not open: {error}") from None

    def rewrap(self, stream_id: UUID, key_id: str, wrapped_key: bytes) -> bytes:
        """A data key that another master key wrapped, wrapped by the present one."""
        bound = stream_id.bytes
        return self._master.wrap(self.key_id, self._master.unwrap(key_id, wrapped_key, bound), bound)

    def digest(self, value: bytes, purpose: str) -> str:
        """HMAC-SHA256, so that a holder of the key can compare values and others cannot guess them."""
        return hmac.new(self._digesting, purpose.encode() + b"\0" + value, hashlib.sha256).hexdigest()


def decode_master_key(text: str, source: str) -> bytes:
    """Base64 as it stands in a file or variable.

    Raises:
        SettingsError: names the source, never the text.
    """
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        raise SettingsError(f"{source}: the master key must be {_KEY_BYTES} bytes in base64 (openssl rand -base64 32)")
    return key


def generate_master_key() -> str:
    """32 random bytes for a new master key, in base64."""
    return base64.b64encode(os.urandom(_KEY_BYTES)).decode()


def _derive(master_key: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=b"sandledger/1/" + info).derive(master_key)


def _encrypt(key: AESGCM, clear: bytes, bound: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + key.encrypt(nonce, clear, bound)


def _decrypt(key: AESGCM, data: bytes, bound: bytes) -> bytes:
    return key.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], bound)
