"""Projections of the log. The current view is written inside the append; it is also the stream head."""
