"""An engine: a Docker daemon or a cluster. The second aggregate of the log."""
