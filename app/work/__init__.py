"""The workers: what is due is claimed, brought to its goal, compared with its engine, and ended in time."""
