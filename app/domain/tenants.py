"""Whose sandboxes a read or a command may reach.

A sandbox belongs to one tenant. The API acts for the tenant of its caller and for no other. Workers and the commands
of the operator act for the installation, and say so by `ANY_TENANT`. It is no default and not None: a caller that
forgets the tenant is an error of types, and a reader sees at the call who may reach every sandbox.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class AnyTenant(Enum):
    """The type of `ANY_TENANT`, which is no slug, so no tenant can have its name."""

    ANY_TENANT = "any tenant"


ANY_TENANT: Final = AnyTenant.ANY_TENANT
