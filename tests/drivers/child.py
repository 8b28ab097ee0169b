"""A process that does one verb and may be killed in it: `python -m tests.drivers.child ADDRESS INSTALLATION VERB WHAT`.

`WHAT` is an object's id, or an image to fetch or to install an agent from. A fetch prints how far it is.
"""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID

from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.runtime.driver import Image, Power, Ref
from tests.drivers.rig import workload


async def act(driver: DockerDriver, verb: str, what: str) -> None:
    match verb:
        case "fetch":
            await driver.fetch(Image(what), lambda text: print(text, flush=True))
        case "ensure":
            await driver.ensure(workload(ref=Ref(UUID(what))))
        case "pause" | "resume":
            await driver.set_power(Ref(UUID(what)), Power.PAUSED if verb == "pause" else Power.RUNNING)
        case "install_agent":
            await driver.install_agent(what)
        case "remove":
            await driver.remove(Ref(UUID(what)))
        case _:
            raise ValueError(verb)


async def main(address: str, installation: str, verb: str, what: str) -> None:
    driver = connect(DockerOptions(installation=UUID(installation)), address)
    try:
        await act(driver, verb, what)
    finally:
        await driver.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
