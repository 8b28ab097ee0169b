"""Sandledger: an OpenSandbox lifecycle server on an append-only event log.

Read `ls app` as the architecture: `api` and `work` are the two shells (HTTP and reconciling), both write only through
`service`; `sandbox` is the pure core; `log`, `views`, `vault` are what PostgreSQL holds; `runtime` is the seam to
container engines; `database` opens PostgreSQL, `settings` reads configuration, `cli` is the command line.
"""

__version__ = "0.1.0"
