"""`sandledger`: picks the command, nothing else."""

from __future__ import annotations

from app.cli.commands import cli


def main() -> None:
    """Entry point of the installed command."""
    cli(prog_name="sandledger")


if __name__ == "__main__":
    main()
