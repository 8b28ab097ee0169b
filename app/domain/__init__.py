"""What all aggregates share, and one package for each aggregate. Pure: no I/O, no clock, no asyncio, no HTTP words."""
