"""What PostgreSQL holds, and how we reach it."""
