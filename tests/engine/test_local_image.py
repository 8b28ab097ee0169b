"""The local busybox image, built and run on the real engine."""

from __future__ import annotations

import asyncio
import shutil
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiodocker
import pytest

from app.cli import local_image
from app.cli.local_image import ensure_busybox_image
from app.errors import RuntimeRejected, RuntimeUnavailable, SettingsError


@pytest.fixture
async def docker(docker_host: str) -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker(url=docker_host) as client:
        yield client


@pytest.fixture
async def reference(docker: aiodocker.Docker) -> AsyncIterator[str]:
    """A name of this test's own; gone at the end, the image with it unless another name holds it."""
    name = f"sandledger-test-{uuid.uuid4().hex}:1"
    yield name
    for tag in (name, f"{name}b"):
        try:
            await docker.images.delete(tag, force=True)
        except aiodocker.DockerError as error:
            if error.status != 404:
                raise


async def _run(docker: aiodocker.Docker, image: str, script: str | None) -> tuple[int, str]:
    config: dict[str, object] = {"Image": image, "NetworkMode": "none", "Labels": {"sandledger-test": image}}
    if script is not None:
        config["Cmd"] = ["sh", "-c", script]
    container = await docker.containers.create(config)
    try:
        await container.start()
        async with asyncio.timeout(60):
            ended = await container.wait()
        return ended["StatusCode"], "".join(await container.log(stdout=True, stderr=True))
    finally:
        await container.delete(force=True)


async def test_a_container_of_the_image_runs_its_commands(docker: aiodocker.Docker, reference: str) -> None:
    assert await ensure_busybox_image(docker, reference) == reference
    code, said = await _run(
        docker,
        reference,
        "set -e; for a in sleep tail true false cat env id ls kill ps test head yes dd httpd wget; do which $a; done;"
        "echo $PATH; id -un; stat -c %a /tmp /root; echo kept >/tmp/f; cat /tmp/f; grep -c . /etc/group;"
        "/usr/bin/env sh -c 'echo by env'; yes | head -n 1",
    )
    assert code == 0, said
    assert said.endswith("/bin\nroot\n1777\n700\nkept\n2\nby env\ny\n")


async def test_without_a_command_the_shell_runs(docker: aiodocker.Docker, reference: str) -> None:
    await ensure_busybox_image(docker, reference)
    assert await _run(docker, reference, None) == (0, "")


async def test_the_same_busybox_gives_the_same_image(docker: aiodocker.Docker, reference: str) -> None:
    other = f"{reference}b"
    await asyncio.gather(*(ensure_busybox_image(docker, name) for name in (reference, other, reference)))
    first, second = [(await docker.images.inspect(name))["Id"] for name in (reference, other)]
    assert first == second


async def test_an_image_that_has_the_name_is_left_alone(
    docker: aiodocker.Docker, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure_busybox_image(docker, reference)
    monkeypatch.setattr(local_image, "_SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", "")
    assert await ensure_busybox_image(docker, reference) == reference


async def test_a_busybox_that_needs_libraries_is_refused_with_the_package_to_install(
    docker: aiodocker.Docker, reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_image, "_SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="no busybox: install the package busybox-static"):
        await ensure_busybox_image(docker, reference)
    dynamic = shutil.copy(Path(sys.executable).resolve(), tmp_path / "busybox")
    Path(dynamic).chmod(0o755)
    with pytest.raises(SettingsError, match="needs shared libraries: install the package busybox-static"):
        await ensure_busybox_image(docker, reference)


async def test_an_engine_that_is_away_is_named_as_such(tmp_path: Path) -> None:
    async with aiodocker.Docker(url=f"unix://{tmp_path}/docker.sock", api_version="v1.41") as nobody:
        with pytest.raises(RuntimeUnavailable, match="make engine"):
            await ensure_busybox_image(nobody)


async def test_a_name_that_no_image_can_have_is_rejected(docker: aiodocker.Docker) -> None:
    with pytest.raises(RuntimeRejected, match="IMAGE_LOAD_FAILED"):
        await ensure_busybox_image(docker, "Not A Name:1")
