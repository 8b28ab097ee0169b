"""The token of an agent: fixed bytes, because every server must derive the same one."""

from __future__ import annotations

from uuid import UUID

from app.agent import agent_token
from app.runtime.workload import Agent

KEY = bytes(range(32))
OBJECT = UUID("0198f000-0000-7000-8000-000000000001")


def test_the_token_is_derived_from_key_object_and_generation():
    token = agent_token(KEY, OBJECT, 1)
    assert token == "641a7c0324f7946b70dc012d04550e1d7f66e22879f668ed026059c3d0aff64e"
    others = {agent_token(bytes(32), OBJECT, 1), agent_token(KEY, UUID(int=1), 1), agent_token(KEY, OBJECT, 2)}
    assert len(others | {token}) == 4


def test_no_repr_shows_it():
    assert "s3cret" not in repr(Agent("volume", "s3cret"))
