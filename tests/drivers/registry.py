"""A small image registry (HTTP API v2) inside the test process, on a free port of 127.0.0.1.

Docker treats 127.0.0.0/8 as insecure and speaks plain HTTP to it, so a real engine really pulls from here.
It serves tiny one-layer images made from the static busybox, counts every request, and can be told to misbehave:
refuse (any status with a registry error code), ask for basic or bearer credentials, or hang in the middle of a layer.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import tarfile
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from platform import machine
from uuid import uuid4

import msgspec
from aiohttp import web

from app.cli.local_image import _find_busybox

NATIVE, FOREIGN = (
    ("linux/arm64", "linux/amd64") if machine() in ("aarch64", "arm64") else ("linux/amd64", "linux/arm64")
)
"""The platform of the engine beside these tests, and one that it is not."""
APPLETS = ("sh", "sleep", "cat", "env", "true", "false", "tail", "dd", "echo")
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def root_filesystem(*, mark: str = "") -> bytes:
    """An uncompressed tar of a root file system that has only busybox; `mark` makes its content unique."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("bin", "etc", "tmp"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for name, data, mode in (
            ("bin/busybox", _find_busybox().read_bytes(), 0o755),
            ("etc/passwd", b"root:x:0:0::/:/bin/sh\n", 0o644),
            ("etc/mark", mark.encode(), 0o644),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            archive.addfile(info, io.BytesIO(data))
        for applet in APPLETS:
            info = tarfile.TarInfo(f"bin/{applet}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(info)
    return buffer.getvalue()


class Fault(msgspec.Struct, frozen=True):
    """What to answer instead of the real thing."""

    status: int
    code: str
    message: str


class Registry:
    """The state of the registry; tests set its public fields while it runs."""

    def __init__(self) -> None:
        self.port = 0
        self.place = uuid4().hex[:12]
        """Leads every image name, so that no other test's image is called the same when a port is used again."""
        self.counts: Counter[str] = Counter()
        """Requests by kind: `ping`, `manifest`, `blob`, `token`."""
        self.manifest_fault: Fault | None = None
        self.credentials: tuple[str, str] | None = None
        self.bearer = False
        self.blob_gate: asyncio.Event | None = None
        """While set and not fired, layers stop half way."""
        self.blob_started = asyncio.Event()
        self.image_ids: set[str] = set()
        """What an engine may call the images: by their configuration, or by their manifest."""
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self._token = uuid4().hex

    @property
    def prefix(self) -> str:
        """What the names of all its images begin with."""
        return f"127.0.0.1:{self.port}/{self.place}/"

    def reference(self, name: str = "tiny", tag: str = "1") -> str:
        return f"{self.prefix}{name}:{tag}"

    def by_digest(self, name: str = "tiny", tag: str = "1") -> str:
        return f"{self.prefix}{name}@{digest(self._manifests[name, tag][1])}"

    def add(self, name: str = "tiny", tag: str = "1", *, platform: str = NATIVE, as_list: bool = False) -> str:
        """Publish an image nobody has yet; returns the reference to pull it by."""
        layer = root_filesystem(mark=uuid4().hex)
        packed = gzip.compress(layer, compresslevel=1)
        os_name, architecture = platform.split("/")
        config = msgspec.json.encode(
            {
                "architecture": architecture,
                "os": os_name,
                "config": {"Cmd": ["sh"]},
                "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
                "history": [{"created_by": "test"}],
            }
        )
        manifest = msgspec.json.encode(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {
                    "mediaType": "application/vnd.docker.container.image.v1+json",
                    "size": len(config),
                    "digest": digest(config),
                },
                "layers": [
                    {
                        "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                        "size": len(packed),
                        "digest": digest(packed),
                    }
                ],
            }
        )
        self._blobs |= {digest(packed): packed, digest(config): config}
        self.image_ids |= {digest(config), digest(manifest)}
        self._publish(name, tag, MANIFEST, manifest)
        if as_list:
            entry = {
                "mediaType": MANIFEST,
                "size": len(manifest),
                "digest": digest(manifest),
                "platform": {"os": os_name, "architecture": architecture},
            }
            index = msgspec.json.encode({"schemaVersion": 2, "mediaType": MANIFEST_LIST, "manifests": [entry]})
            self._publish(name, tag, MANIFEST_LIST, index)
        return self.reference(name, tag)

    def _publish(self, name: str, tag: str, media_type: str, document: bytes) -> None:
        self._manifests[name, tag] = self._manifests[name, digest(document)] = (media_type, document)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v2/", self._ping)
        app.router.add_get("/token", self._issue)
        app.router.add_get("/v2/{name:.+}/manifests/{reference}", self._manifest)
        app.router.add_get("/v2/{name:.+}/blobs/{digest}", self._blob)
        return app

    def _refusal(self, request: web.Request) -> web.Response | None:
        """401 with the challenge of the configured kind, None when the request may pass."""
        if self.credentials is None:
            return None
        given = request.headers.get("Authorization", "")
        if given == (f"Bearer {self._token}" if self.bearer else self._basic()):
            return None
        challenge = 'Basic realm="test"'
        if self.bearer:
            challenge = f'Bearer realm="http://127.0.0.1:{self.port}/token",service="test"'
        return error(401, "UNAUTHORIZED", "authentication required", {"WWW-Authenticate": challenge})

    def _basic(self) -> str:
        return "Basic " + b64encode(":".join(self.credentials or ("", "")).encode()).decode()

    async def _ping(self, request: web.Request) -> web.Response:
        self.counts["ping"] += 1
        return self._refusal(request) or web.json_response({})

    async def _issue(self, request: web.Request) -> web.Response:
        self.counts["token"] += 1
        if request.headers.get("Authorization") == self._basic():
            return web.json_response({"token": self._token, "expires_in": 300})
        if "Authorization" in request.headers:
            return error(401, "UNAUTHORIZED", "incorrect username or password")
        return web.json_response({"token": "anonymous", "expires_in": 300})

    async def _manifest(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        if request.method == "GET":
            self.counts["manifest"] += 1
        if fault := self.manifest_fault:
            return error(fault.status, fault.code, fault.message)
        found = self._manifests.get(
            (request.match_info["name"].removeprefix(f"{self.place}/"), request.match_info["reference"])
        )
        if found is None:
            return error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        media_type, document = found
        headers = {"Content-Type": media_type, "Docker-Content-Digest": digest(document)}
        return web.Response(body=document, headers=headers)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        data = self._blobs.get(request.match_info["digest"])
        if data is None:
            return error(404, "BLOB_UNKNOWN", "blob unknown")
        self.counts["blob"] += 1
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        self.blob_started.set()
        if self.blob_gate is not None:
            await self.blob_gate.wait()
        await response.write(data[len(data) // 2 :])
        await response.write_eof()
        return response


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"errors": [{"code": code, "message": message}]}, status=status, headers=headers)


@asynccontextmanager
async def serve() -> AsyncIterator[Registry]:
    """A running registry, gone at the end of the block even while a layer hangs."""
    registry = Registry()
    runner = web.AppRunner(registry.application(), shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    registry.port = runner.addresses[0][1]
    try:
        yield registry
    finally:
        if registry.blob_gate is not None:
            registry.blob_gate.set()
        await runner.cleanup()
