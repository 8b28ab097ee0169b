"""A process that fetches one image: `python -m tests.drivers.fetcher ADDRESS REFERENCE`. Prints how far it is."""

from __future__ import annotations

import asyncio
import sys
from uuid import uuid4

from app.runtime.docker import DockerOptions, connect
from app.runtime.driver import Image


async def main(address: str, reference: str) -> None:
    driver = connect(DockerOptions(installation=uuid4()), address)
    try:
        await driver.fetch(Image(reference), lambda text: print(text, flush=True))
    finally:
        await driver.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
