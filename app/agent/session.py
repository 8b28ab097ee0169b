"""aiohttp's client without its habits, for all who talk to sandboxes.

What a sandbox sends is a stranger's. So no cookie is kept, no proxy and no password of the environment is used, nothing
is decompressed, and nothing is repeated: aiohttp would send a PUT or a DELETE again when the connection ends without an
answer. Redirects are followed where a request says so; none of ours does.
"""

from __future__ import annotations

from typing import Any

import aiohttp


def plain_session(
    connector: aiohttp.BaseConnector, timeout: aiohttp.ClientTimeout, **more: Any
) -> aiohttp.ClientSession:
    """A session on these connections. Made inside the event loop."""
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        **more,
    )
    session._retry_connection = False  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - it has no public switch
    return session
