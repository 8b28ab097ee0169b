"""The agent inside a sandbox (OpenSandbox's execd): its token, and how it is asked."""

from app.agent.token import AGENT_PORT, TOKEN_HEADER, agent_token

__all__ = ["AGENT_PORT", "TOKEN_HEADER", "agent_token"]
