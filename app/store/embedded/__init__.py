"""The embedded PostgreSQL: its account, its cluster on disk, and who uses it."""
