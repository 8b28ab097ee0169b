"""The PostgreSQL that comes with us: its account, its cluster on disk, and who uses it."""
