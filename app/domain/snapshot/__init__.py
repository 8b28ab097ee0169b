"""A snapshot: the files of a sandbox at one moment, kept as an image. The third aggregate of the log."""
