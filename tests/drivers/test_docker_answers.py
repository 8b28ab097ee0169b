"""What is read from the engine's answers: addresses, and the progress of a pull."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from app.domain.sandbox.observed import Address
from app.runtime.docker import names
from app.runtime.docker.answers import Actor, Amount, Event, HostPart, ImageShown, Inspected, PullLine, observed
from app.runtime.docker.events import hint_in
from app.runtime.docker.images import digest_in, has_platform, repository
from app.runtime.docker.progress import Layers, Meter
from app.runtime.driver import Change, Hint

WHOSE = names.Identity(uuid4(), "main", "sandbox-x")


def shown(network: dict[str, Any] | None, status: str = "running") -> Inspected:
    now = datetime.now(UTC).isoformat()
    state = {"Status": status, "StartedAt": now, "FinishedAt": now, "Error": "\x1b[2J"}
    document = {"Id": "1", "Name": "/x", "Created": now, "Image": "i", "State": state, "Config": {}}
    return msgspec.convert(document | ({} if network is None else {"NetworkSettings": network}), Inspected)


@pytest.mark.parametrize(
    ("network", "address"),
    [
        (None, None),
        ({}, None),
        ({"Networks": None, "Ports": None}, None),
        ({"Networks": {"bridge": {"IPAddress": ""}}}, None),
        ({"Networks": {"own": {"IPAddress": "10.1.2.3"}}, "IPAddress": ""}, Address("own", "10.1.2.3")),
        ({"Networks": {"host": {"IPAddress": ""}}}, Address("host")),
        (
            {
                "Networks": {"bridge": {"IPAddress": "10.1.2.3"}},
                "Ports": {
                    "8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": "32768"}],
                    "53/udp": [{"HostIp": "::", "HostPort": "5353"}],
                    "99/tcp": None,
                    "98/tcp": [{"HostIp": "", "HostPort": ""}],
                },
            },
            Address("bridge", "10.1.2.3", {"8080": "127.0.0.1:32768", "53/udp": "[::]:5353"}),
        ),
    ],
)
def test_addresses(network: dict[str, Any] | None, address: Address | None):
    assert observed(shown(network), WHOSE).address == address
    assert observed(shown(network, "paused"), WHOSE).address == address
    for gone in ("exited", "created", "removing", "dead"):
        assert observed(shown(network, gone), WHOSE).address is None


def test_the_message_of_an_exit_has_no_control_characters():
    seen = observed(shown(None, "exited"), WHOSE)
    assert seen.exit is not None
    assert seen.exit.message == "\\x1b[2J"


@pytest.mark.parametrize(
    ("devices", "gpus"),
    [
        (None, None),
        ([], None),
        ([{"Count": 2, "Capabilities": [["gpu"]]}], 2),
        ([{"Driver": "nvidia", "Count": 1, "DeviceIDs": None, "Capabilities": [["compute"], ["gpu", "utility"]]}], 1),
        ([{"Count": -1, "Capabilities": [["gpu"]]}], None),
        ([{"Count": 2, "Capabilities": [["gpu"]]}, {"Count": -1, "Capabilities": [["gpu"]]}], None),
        ([{"Count": 3, "Capabilities": [["tpu"]]}, {"Count": 3, "Capabilities": None}], None),
    ],
)
def test_gpus_are_counted_when_the_engine_says_how_many(devices: list[dict[str, Any]] | None, gpus: int | None):
    document = msgspec.structs.replace(shown(None), host_config=msgspec.convert({"DeviceRequests": devices}, HostPart))
    assert observed(document, WHOSE).gpus == gpus


@pytest.mark.parametrize(
    ("action", "nanos", "change", "at"),
    [
        ("pause", 1_767_225_600_123_456_999, Change.PAUSED, datetime(2026, 1, 1, 0, 0, 0, 123456, UTC)),
        ("unpause", 1_767_225_600_000_000_001, Change.RESUMED, datetime(2026, 1, 1, tzinfo=UTC)),
        ("destroy", 0, Change.REMOVED, None),
        ("die", 1_767_225_600_999_999_999, Change.OTHER, datetime(2026, 1, 1, 0, 0, 0, 999999, UTC)),
        ("a word of a newer engine", -5, Change.OTHER, None),
    ],
)
def test_an_event_says_what_changed_and_when(action: str, nanos: int, change: Change, at: datetime | None):
    installation, object_id = uuid4(), uuid4()
    labels = names.labels_of(installation, object_id, names.MAIN, tenant="t", generation=1, position=7)
    actor = Actor("c1", labels | {"name": names.container_name(object_id)})
    assert hint_in(Event(action, actor, nanos), installation) == Hint(object_id, "c1", change, at)
    assert hint_in(Event(action, actor, nanos), uuid4()) is None, "a stranger's"


def line(layer: str, status: str, current: int = 0, total: int = 0) -> PullLine:
    return PullLine(status, layer, Amount(current, total) if total else None)


def test_progress_is_counted_by_layers_and_bytes():
    layers = Layers()
    steps = [
        (line("1.0", "Pulling from team/app"), ""),  # the tag, not a layer
        (line("", "Status: Downloaded newer image"), ""),
        (line("a", "Pulling fs layer"), "0 of 1 layers"),
        (line("b", "Pulling fs layer"), "0 of 2 layers"),
        (line("c", "Already exists"), "1 of 3 layers"),
        (line("b", "Waiting"), "1 of 3 layers"),
        (line("a", "Downloading", 500_000, 41_000_000), "1 of 3 layers, 0.5 of 41.0 MB"),
        (line("b", "Downloading", 1_000_000, 79_000_000), "1 of 3 layers, 1.5 of 120.0 MB"),
        (line("a", "Download complete"), "1 of 3 layers, 42.0 of 120.0 MB"),
        (line("a", "Extracting", 1, 41_000_000), "1 of 3 layers, 42.0 of 120.0 MB"),
        (line("a", "Pull complete"), "2 of 3 layers, 42.0 of 120.0 MB"),
        (line("d", "Some word that nobody knows"), "2 of 3 layers, 42.0 of 120.0 MB"),
    ]
    for told, text in steps:
        layers.note(told)
        assert str(layers) == text


async def test_progress_is_told_once_and_not_too_often():
    told = list[str]()
    meter = Meter(told.append)
    for _ in range(100):
        meter.note(line("a", "Pulling fs layer"))
    for done in range(1, 1000):
        meter.note(line("a", "Downloading", done, 1000))
    assert told == ["0 of 1 layers"]
    while len(told) < 2:
        await asyncio.sleep(0.05)
    assert told[1] == "0 of 1 layers, 0.0 of 0.0 MB", "the last one, although no line came any more"
    meter.note(line("a", "Pull complete"))
    meter.close()
    assert len(told) == 2


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("app", "app"),
        ("app:1", "app"),
        ("library/app:1", "app"),
        ("docker.io/library/app:1", "app"),
        ("docker.io/team/app", "team/app"),
        ("localhost:5000/app", "localhost:5000/app"),
        ("r.test:5000/team/app:1@sha256:0", "r.test:5000/team/app"),
    ],
)
def test_the_repository_in_a_reference(reference: str, name: str):
    assert repository(reference) == name


def test_the_digest_is_that_of_the_references_own_repository():
    image = ImageShown("sha256:i", repo_digests=["other/app@sha256:1", "docker.io/team/app@sha256:2"])
    assert digest_in(image, "team/app:latest") == "sha256:2"
    assert digest_in(image, "retagged:1") == "sha256:1"
    assert digest_in(ImageShown("sha256:i"), "team/app") is None


@pytest.mark.parametrize(
    ("platform", "fits"),
    [(None, True), ("linux/arm64", True), ("linux/arm64/v8", True), ("linux/amd64", False), ("linux", False)],
)
def test_platforms(platform: str | None, fits: bool):
    assert has_platform(ImageShown("i", "linux", "arm64"), platform) is fits
