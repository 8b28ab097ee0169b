"""Images on the engine: what a reference names, and by which digest its registry knows it.

A container shows the id of its image only. The digest needs an inspect call for the image, one for each image and
repository: an image id stands for its content, so the answer is remembered. Where the engine does not answer, the
digest stays unknown; it is for the record, and nothing depends on it.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from urllib.parse import quote

from app.errors import RuntimeUnavailable
from app.runtime.docker.answers import ImageShown
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.driver import FetchedImage

IMAGE_ID = re.compile(r"(sha256:)?[0-9a-f]{64}\Z")
_MAX_REMEMBERED_DIGESTS = 1024
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\-\[\]+]*\Z")
_MAY_BE_ID = re.compile(r"[0-9a-f]{1,63}")
_DEFAULT_HOSTS = ("docker.io/", "index.docker.io/")


class Images:
    """Inspects and remembers the images of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._digests: dict[tuple[str, str], str | None] = {}

    async def show(self, reference: str) -> ImageShown | None:
        """Inspect an image, by reference or id. None = it is not there, or the reference names no image at all."""
        if not is_reference(reference):
            return None
        try:
            name = quote(unambiguous(reference), safe="/:@")
            return await self._engine.ask(f"images/{name}/json", ImageShown)
        except Refused as refused:
            if refused.status in (HTTPStatus.NOT_FOUND, HTTPStatus.BAD_REQUEST):
                return None
            raise trouble("show an image", refused) from None

    async def digest_of(self, image_id: str | None, reference: str) -> str | None:
        """The registry's digest of an image that a container runs. None: it has none, or it is not known."""
        if image_id is None:
            return None
        key = image_id, repository(reference)
        if key not in self._digests:
            try:
                # By id: the tag may have moved since the container was made.
                shown = await self.show(image_id)
            except RuntimeUnavailable:
                return None
            self._store(key, None if shown is None else digest_in(shown, reference))
        return self._digests[key]

    def known_digest(self, image_id: str | None, reference: str) -> str | None:
        """The same without asking the engine."""
        return self._digests.get((image_id or "", repository(reference)))

    def fetched(self, shown: ImageShown, reference: str) -> FetchedImage:
        """What an inspect call by this reference says about an image."""
        digest = digest_in(shown, reference)
        self._store((shown.id, repository(reference)), digest)
        return FetchedImage(shown.id, digest, shown.size)

    def _store(self, key: tuple[str, str], digest: str | None) -> None:
        self._digests.pop(key, None)
        self._digests[key] = digest
        while len(self._digests) > _MAX_REMEMBERED_DIGESTS:
            del self._digests[next(iter(self._digests))]


def unambiguous(reference: str) -> str:
    """The engine also takes the beginning of an image's id. A name that could be one gets the tag that it has anyway.
    So no request reaches an image, e.g. of another tenant's snapshot, by guessing a few digits.
    """
    return f"{reference}:latest" if _MAY_BE_ID.fullmatch(reference) else reference


def has_platform(shown: ImageShown, platform: str | None) -> bool:
    """Whether the image runs on `os/arch`."""
    if platform is None:
        return True
    wanted = platform.split("/")
    return (shown.os, shown.architecture) == (wanted[0], wanted[1] if len(wanted) > 1 else "")


def digest_in(shown: ImageShown, reference: str) -> str | None:
    """The digest by which the reference's own repository knows the image; else that of any other."""
    known = {name: digest for name, _, digest in (entry.partition("@") for entry in shown.repo_digests or ())}
    wanted = repository(reference)
    for name, digest in known.items():
        if repository(name) == wanted:
            return digest
    return min(known.values(), default=None)


def repository(reference: str) -> str:
    """A reference without tag and digest, and without the parts that the default registry leaves out."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    name = f"{head}{slash}{last.partition(':')[0]}"
    for host in _DEFAULT_HOSTS:
        name = name.removeprefix(host)
    return name.removeprefix("library/")


def is_reference(text: str) -> bool:
    """Whether it can stand in a path of the engine's API. The grammar itself is the engine's to check."""
    return _REFERENCE.match(text) is not None and all(part not in ("", ".", "..") for part in text.split("/"))


def has_tag(reference: str) -> bool:
    """Whether it names one image and not all of a repository."""
    last = reference.rpartition("/")[2]
    return ":" in last or "@" in last


def registry_of(reference: str) -> str:
    """The registry's host in a reference, if its first part looks like one; else empty, the default registry."""
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else ""
