"""The only write path: load, decide, append, retry."""
