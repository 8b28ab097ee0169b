"""Deadlines of streams: one row each, written by the append, fired by the scheduler."""
