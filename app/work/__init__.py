"""The imperative workers: reconcile queue, reconciler, resync, expiry."""
