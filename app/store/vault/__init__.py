"""Secrets: sealed on acceptance, unsealed only to make the container, erased when the sandbox ends."""
