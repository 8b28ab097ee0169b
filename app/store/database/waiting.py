"""Wait for a database that is not there yet: it may be starting beside us, recovering, or failing over.

Only what time can change is waited for. A wrong password, an unknown database or a DSN that does not parse ends the
wait at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app.errors import StoreRefused, StoreUnavailable
from app.store.database.connect import dial
from app.store.database.dsn import address

_MIN_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 2.0
_REPORT_SECONDS = 5.0


async def wait_until_there(dsn: str, where: str, seconds: float, say: Callable[[str], None], *, limit: float) -> None:
    """Return when PostgreSQL lets a connection in. `where` is shown, `limit` is for each attempt.

    Raises:
        StoreUnavailable: it was not there in time. StoreRefused, SettingsError: it never will be.
    """
    clock = asyncio.get_running_loop().time
    target = address(dsn)
    begin, pause, reported = clock(), _MIN_PAUSE_SECONDS, float("-inf")
    while True:
        try:
            driver = await dial(target, limit, {"application_name": "sandledger"})
        except StoreRefused:
            raise
        except StoreUnavailable as error:
            left = begin + seconds - clock()
            if left <= 0:
                raise StoreUnavailable(
                    f"waited {seconds:g} s for {where}: {error}. Start it, or correct store.postgresql.dsn "
                    "(OPENSANDBOX_STORE_POSTGRESQL_DSN, DATABASE_URL); sandledger.start_wait_seconds sets the time"
                ) from error
            if clock() - reported >= _REPORT_SECONDS:
                reported = clock()
                say(f"waiting up to {left:.0f} s for {where}: {error}")
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)
        else:
            driver.terminate()
            return
