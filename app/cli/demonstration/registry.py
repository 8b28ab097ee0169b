"""A slow image registry (OCI distribution specification, pull only) on a loopback port, for the demo.

It serves one image: the local busybox image's files, and layers of random bytes that come at a trickle, so that a pull
takes some seconds and its progress can be watched. Engines speak plain HTTP to loopback registries.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CHUNK_BYTES = 64 * 1024
_RANDOM_LAYERS = 3
_RANDOM_BYTES = 2 * 1024 * 1024


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _layer(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _described(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "size": len(data), "digest": _digest(data)}


class SlowRegistry:
    """One image, read at a bounded rate."""

    def __init__(self, root_filesystem: bytes, architecture: str, bytes_per_second: int) -> None:
        """`root_filesystem` is a tar of a runnable root file system."""
        random = [_layer(f"blob-{number}", os.urandom(_RANDOM_BYTES)) for number in range(_RANDOM_LAYERS)]
        layers = [root_filesystem, *random]
        config = msgspec.json.encode(
            {
                "architecture": architecture,
                "os": "linux",
                "config": {"Cmd": ["sh"]},
                "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
            }
        )
        self._manifest = msgspec.json.encode(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": _described(_CONFIG, config),
                "layers": [_described(_LAYER, layer) for layer in layers],
            }
        )
        self._blobs = {_digest(blob): blob for blob in (config, *layers)}
        self._pause = _CHUNK_BYTES / bytes_per_second
        self.port = 0

    @property
    def reference(self) -> str:
        """What to pull."""
        return f"127.0.0.1:{self.port}/slow:1"

    def application(self) -> web.Application:
        """The routes that a pull uses."""
        app = web.Application()
        app.router.add_get("/v2/", self._ping)
        app.router.add_get("/v2/slow/manifests/{reference}", self._read_manifest)
        app.router.add_get("/v2/slow/blobs/{digest}", self._read_blob)
        return app

    async def _ping(self, _request: web.Request) -> web.Response:
        return web.json_response({})

    async def _read_manifest(self, request: web.Request) -> web.Response:
        if request.match_info["reference"] not in ("1", _digest(self._manifest)):
            raise web.HTTPNotFound
        headers = {"Content-Type": MANIFEST, "Docker-Content-Digest": _digest(self._manifest)}
        return web.Response(body=self._manifest, headers=headers)

    async def _read_blob(self, request: web.Request) -> web.StreamResponse:
        data = self._blobs.get(request.match_info["digest"])
        if data is None:
            raise web.HTTPNotFound
        answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await answer.prepare(request)
        for start in range(0, len(data), _CHUNK_BYTES):
            await answer.write(data[start : start + _CHUNK_BYTES])
            await asyncio.sleep(self._pause)
        await answer.write_eof()
        return answer


@asynccontextmanager
async def serve(registry: SlowRegistry) -> AsyncGenerator[SlowRegistry]:
    """On a free loopback port until the end of the block."""
    runner = web.AppRunner(registry.application(), shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        registry.port = runner.addresses[0][1]
        yield registry
    finally:
        await runner.cleanup()
