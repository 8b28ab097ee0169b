"""Connections, errors and migrations."""
