"""Kinds of values of settings, with their bounds.

Two marks in `Meta(extra=...)` carry meaning:

* `secret`: the value never appears in a repr, a rich repr or an error message;
* `env_only`: the value comes from the named environment variable and is refused in a file.

A `description` is what an error message says is allowed.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

_MAX_SECONDS = 366 * 24 * 3600

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0, le=_MAX_SECONDS)]
Grace = Annotated[float, Meta(ge=0, le=_MAX_SECONDS)]
Lease = Annotated[float, Meta(ge=1, le=_MAX_SECONDS)]
"""A shorter one would run out between two statements: nothing would ever be held, and the loops would spin."""
WholeSeconds = Annotated[int, Meta(ge=1, le=_MAX_SECONDS)]
ApiKey = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z", description="text in one line", extra={"secret": True})]
Environment = Annotated[
    dict[str, str], Meta(description="a table of text values (quote numbers)", extra={"secret": True})
]
Dsn = Annotated[
    str,
    Meta(
        pattern=r"^\s*((postgres|postgresql|postgresql\+asyncpg)://|\w+\s*=)",
        description="a URL that starts with postgresql://, postgres:// or postgresql+asyncpg://, or libpq's key=value",
        extra={"secret": True},
    ),
]
MasterKey = Annotated[
    bytes,
    Meta(
        min_length=32,
        max_length=32,
        description="32 random bytes in base64, such as `openssl rand -base64 32` prints",
        extra={"secret": True, "env_only": "SANDLEDGER_MASTER_KEY"},
    ),
]
PreviousMasterKey = Annotated[
    bytes,
    Meta(
        min_length=32,
        max_length=32,
        description="the master key that was in use before, in base64",
        extra={"secret": True, "env_only": "SANDLEDGER_PREVIOUS_MASTER_KEY"},
    ),
]
Quantity = Annotated[str, Meta(pattern=r"^[0-9.]+[a-zA-Z]*\Z", description="a Kubernetes quantity such as 500m or 2Gi")]
Insecure = Annotated[bool, Meta(extra={"env_only": "OPENSANDBOX_INSECURE_SERVER=YES"})]
EngineAddress = Annotated[
    str,
    Meta(
        pattern=r"^(unix|tcp|http|https|npipe)://.",
        description="a URL such as unix:///var/run/docker.sock or tcp://127.0.0.1:2375",
    ),
]
Host = Annotated[
    str,
    Meta(pattern=r"^[0-9A-Za-z._:-]*\Z", description="an IP address or a host name, without scheme and port"),
]
PublicAddress = Annotated[
    str,
    Meta(
        pattern=r"^([A-Za-z][A-Za-z0-9+.-]*://)?[^\s/?#@\x00-\x1f]+(/[^\s?#\x00-\x1f]*)?\Z|^\Z",
        description="a host, with a port and a path if need be, such as sandboxes.example.com:8443/path",
    ),
]
Origin = Annotated[
    str,
    Meta(
        pattern=r"^https?://[^\s/?#@\x00-\x1f]+\Z",
        description="scheme and host, with a port if need be, such as https://ide.example.com:8443",
    ),
]
WildcardDomain = Annotated[
    str,
    Meta(
        pattern=r"^\*(\.[0-9A-Za-z]([0-9A-Za-z-]{0,61}[0-9A-Za-z])?)+(:[0-9]{1,5})?\Z|^\Z",
        description="*. and a domain, with a port if need be, such as *.sandboxes.example.com",
    ),
]
Subnet = Annotated[
    str,
    Meta(
        pattern=r"^[0-9]{1,3}(\.[0-9]{1,3}){3}/(1[6-9]|2[0-4])\Z",
        description="a private IPv4 subnet with 16 to 24 bits, such as 10.212.0.0/18",
    ),
]
SUBNETS = (
    *(f"10.{212 + number // 4}.{number % 4 * 64}.0/18" for number in range(16)),
    # For machines that route all of 10.0.0.0/8.
    "172.29.0.0/18",
    "192.168.192.0/20",
)
Port = Annotated[int, Meta(ge=1024, le=65535)]
LogSize = Annotated[
    str, Meta(pattern=r"^[1-9][0-9]*[kmg]?\Z", description="a size in bytes, or with k, m or g, such as 10m")
]
