"""Sealing: AES-256-GCM (NIST SP 800-38D), one data key a sandbox, wrapped by the master key.

The master key is 32 bytes from the environment or a file; every replica on one database needs the same, and
`installation.master_key_id` refuses another one at start instead of at the first unseal. From it are derived (HKDF,
RFC 5869): the wrapping key, and the key of the digests that stand in events where a value must not.

The sandbox id is bound as associated data, so a sealed row copied to another sandbox does not open.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
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
    """The values of one sandbox, in the clear. Lives only between request and seal, and between unseal and engine."""

    env: dict[str, str] = {}
    registry_username: str | None = None
    registry_password: str | None = None

    def __repr__(self) -> str:
        """Names only."""
        return f"Secrets(env={sorted(self.env)})"


class Sealed(Struct, frozen=True):
    """As stored."""

    key_id: str
    wrapped_key: bytes
    sealed: bytes


class Unsealable(SandledgerError):
    """A sealed row does not open: another master key, or somebody changed it."""


class Sealer:
    """Seals, unseals, digests. Holds the derived keys, never prints them."""

    def __init__(self, master_key: bytes) -> None:
        """From 32 bytes of key material."""
        if len(master_key) != _KEY_BYTES:
            raise SettingsError(f"the master key must be {_KEY_BYTES} bytes, base64; got {len(master_key)}")
        self._wrapping = AESGCM(_derive(master_key, b"wrap"))
        self._digesting = _derive(master_key, b"digest")
        self.key_id = _derive(master_key, b"id")[:8].hex()

    def seal(self, sandbox_id: UUID, secrets: Secrets) -> Sealed:
        """Encrypt under a fresh data key, and wrap that."""
        data_key = AESGCM.generate_key(256)
        bound = sandbox_id.bytes
        return Sealed(
            self.key_id,
            _encrypt(self._wrapping, data_key, bound),
            _encrypt(AESGCM(data_key), msgspec.json.encode(secrets), bound),
        )

    def unseal(self, sandbox_id: UUID, sealed: Sealed) -> Secrets:
        """The values again.

        Raises:
            Unsealable: says which key sealed it.
        """
        bound = sandbox_id.bytes
        try:
            data_key = _decrypt(self._wrapping, sealed.wrapped_key, bound)
            return msgspec.json.decode(_decrypt(AESGCM(data_key), sealed.sealed, bound), type=Secrets)
        except (InvalidTag, ValueError):
            raise Unsealable(
                f"the secrets of sandbox {sandbox_id} do not open: sealed by master key {sealed.key_id}, "
                f"this server has {self.key_id}"
            ) from None

    def digest(self, value: bytes, purpose: str) -> str:
        """HMAC-SHA256, so that equal values can be seen to be equal by whoever has the key, and guessed by nobody."""
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
    """A new key, base64."""
    return base64.b64encode(os.urandom(_KEY_BYTES)).decode()


def _derive(master_key: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=b"sandledger/1/" + info).derive(master_key)


def _encrypt(key: AESGCM, clear: bytes, bound: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + key.encrypt(nonce, clear, bound)


def _decrypt(key: AESGCM, data: bytes, bound: bytes) -> bytes:
    return key.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], bound)
