"""Drivers: the only part that talks to a container engine."""
