"""One sandbox after the other: claim, plan, act, record."""
