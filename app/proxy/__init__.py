"""Bytes to and from sandboxes: route, resolve, headers, client, relay. Nothing imports this room but the server."""
