"""The pure core: what a sandbox is, what may be asked of it, what happened to it. No I/O, no clock, no asyncio."""
