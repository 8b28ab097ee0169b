"""Sealed values: open to the right key and sandbox, to nothing else, and seen nowhere."""

from __future__ import annotations

import base64
import os
import traceback
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import SettingsError
from app.store.vault.seal import Sealed, Sealer, Secrets, Unsealable, decode_master_key, generate_master_key

CANARY = "canary-7f3a91"
VALUES = Secrets({"TOKEN": CANARY, "OTHER": f"x{CANARY}"}, f"user-{CANARY}", f"password-{CANARY}")
ID = uuid4()


def test_what_was_sealed_opens(sealer: Sealer):
    assert sealer.unseal(ID, sealer.seal(ID, VALUES)) == VALUES


@given(st.dictionaries(st.text(), st.text()), st.none() | st.text(), st.none() | st.text())
def test_any_values_open_as_they_were(env: dict[str, str], username: str | None, password: str | None):
    sealer = Sealer(b"k" * 32)
    values = Secrets(env, username, password)
    assert sealer.unseal(ID, sealer.seal(ID, values)) == values


def test_another_process_with_the_same_key_opens_it():
    key = os.urandom(32)
    assert Sealer(key).key_id == Sealer(key).key_id
    assert Sealer(key).unseal(ID, Sealer(key).seal(ID, VALUES)) == VALUES


def refused(sealer: Sealer, sandbox_id: UUID, sealed: Sealed) -> str:
    with pytest.raises(Unsealable) as caught:
        sealer.unseal(sandbox_id, sealed)
    told = "".join(traceback.format_exception(caught.value))
    assert CANARY not in told
    return str(caught.value)


def test_another_master_key_is_named_and_opens_nothing(sealer: Sealer):
    other = Sealer(os.urandom(32))
    told = refused(other, ID, sealer.seal(ID, VALUES))
    assert sealer.key_id in told
    assert other.key_id in told


def test_a_row_copied_to_another_sandbox_does_not_open(sealer: Sealer):
    refused(sealer, uuid4(), sealer.seal(ID, VALUES))


def test_values_under_another_sandboxes_data_key_do_not_open(sealer: Sealer):
    other = uuid4()
    one, two = sealer.seal(ID, VALUES), sealer.seal(other, VALUES)
    refused(sealer, ID, msgspec.structs.replace(one, wrapped_key=two.wrapped_key))
    refused(sealer, ID, msgspec.structs.replace(one, sealed=two.sealed))
    again = sealer.seal(ID, VALUES)
    refused(sealer, ID, msgspec.structs.replace(one, sealed=again.sealed))


@pytest.mark.parametrize("field", ["wrapped_key", "sealed"])
def test_one_changed_bit_anywhere_does_not_open(sealer: Sealer, field: str):
    sealed = sealer.seal(ID, Secrets({"A": "b"}))
    stored: bytes = getattr(sealed, field)
    for place in range(len(stored)):
        changed = bytearray(stored)
        changed[place] ^= 1
        refused(sealer, ID, msgspec.structs.replace(sealed, **{field: bytes(changed)}))


@pytest.mark.parametrize("field", ["wrapped_key", "sealed"])
def test_a_row_cut_short_does_not_open(sealer: Sealer, field: str):
    sealed = sealer.seal(ID, Secrets({"A": "b"}))
    stored: bytes = getattr(sealed, field)
    for length in range(len(stored)):
        refused(sealer, ID, msgspec.structs.replace(sealed, **{field: stored[:length]}))


def test_nothing_readable_is_stored_and_nothing_twice_the_same(sealer: Sealer):
    one, two = sealer.seal(ID, VALUES), sealer.seal(ID, VALUES)
    for sealed in (one, two):
        for stored in (sealed.wrapped_key, sealed.sealed):
            assert CANARY.encode() not in stored
            assert b"TOKEN" not in stored
    assert one.sealed != two.sealed
    assert one.wrapped_key != two.wrapped_key
    assert one.sealed[:12] != two.sealed[:12], "a nonce serves once"


def test_nothing_shows_itself(sealer: Sealer):
    shown = repr(VALUES) + str(VALUES) + f"{VALUES}" + repr(sealer) + repr(vars(sealer)) + repr(sealer.seal(ID, VALUES))
    assert CANARY not in shown
    assert "['OTHER', 'TOKEN']" in shown, "names are no secret"
    key = os.urandom(32)
    assert key not in vars(Sealer(key)).values()


def test_digests_differ_by_key_purpose_and_value(sealer: Sealer):
    value = b"hunter2"
    digest = sealer.digest(value, "env")
    assert digest == sealer.digest(value, "env")
    others = [
        sealer.digest(value, "fingerprint"),
        sealer.digest(b"hunter3", "env"),
        Sealer(os.urandom(32)).digest(value, "env"),
    ]
    assert len({digest, *others}) == 4


def test_a_master_key_is_thirty_two_bytes_in_base64():
    key = generate_master_key()
    assert len(decode_master_key(f" {key}\n", "here")) == 32
    assert generate_master_key() != key
    for wrong in ("", "short", key[:-4], key + key, "!" * 44, base64.b64encode(b"x" * 31).decode(), CANARY, "é" * 44):
        with pytest.raises(SettingsError, match="in base64") as caught:
            decode_master_key(wrong, "SOURCE")
        assert "SOURCE" in str(caught.value)
        assert len(wrong) < 5 or wrong not in str(caught.value)
    for length in (0, 31, 33):
        with pytest.raises(SettingsError):
            Sealer(b"k" * length)
