"""The event log: append-only, ordered, tailed. Knows streams and bytes, not sandboxes."""
