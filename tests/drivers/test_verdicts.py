"""The engine's texts, typed. Those without an engine test of their own are of its other image store, or of a network."""

from __future__ import annotations

import msgspec
import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.docker.engine import Refused
from app.runtime.docker.options import DockerOptions
from app.runtime.docker.pull import credentials_header, registry_of
from app.runtime.docker.spec import container_config
from app.runtime.docker.verdicts import create_verdict, is_image_missing, pull_cause, start_verdict
from app.runtime.driver import Limits, RegistryAuth
from app.runtime.faults import AttemptFailed
from tests.drivers.rigs import workload

AUTH = RegistryAuth("reader", "a-long-password")
HIDING = "pull access denied for team/app, repository does not exist or may require 'docker login': denied"
OCI = "failed to create shim task: OCI runtime create failed: runc create failed: "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("manifest for team/app:1 not found: manifest unknown: manifest unknown", "IMAGE_NOT_FOUND"),
        ('failed to resolve reference "team/app:1": team/app:1: not found', "IMAGE_NOT_FOUND"),
        (HIDING, "IMAGE_NOT_FOUND"),
        ("unauthorized: authentication required", "IMAGE_AUTH_REQUIRED"),
        ("no match for platform in manifest: not found", "IMAGE_PLATFORM_MISMATCH"),
        ("toomanyrequests: You have reached your pull rate limit", "REGISTRY_RATE_LIMITED"),
        ("unexpected status code 429 Too Many Requests", "REGISTRY_RATE_LIMITED"),
        ('Get "https://r.test/v2/": dial tcp: lookup r.test on 10.0.0.1:53: no such host', "REGISTRY_UNREACHABLE"),
        ('Get "https://r.test/v2/": net/http: TLS handshake timeout', "REGISTRY_UNREACHABLE"),
        ("tls: failed to verify certificate: x509: certificate signed by unknown authority", "REGISTRY_UNREACHABLE"),
        ("failed to register layer: write /x: no space left on device", "IMAGE_PULL_FAILED"),
        ("something nobody has ever read", "IMAGE_PULL_FAILED"),
        ("dial unix /run/containerd/containerd.sock: connect: connection refused", ""),
    ],
)
def test_pull(text: str, reason: str):
    error = pull_cause("team/app:1", None, text).error()
    assert getattr(error, "reason", "") == reason
    assert isinstance(error, RuntimeUnavailable) == (reason == "")
    final = reason in ("IMAGE_NOT_FOUND", "IMAGE_AUTH_REQUIRED", "IMAGE_PLATFORM_MISMATCH")
    assert isinstance(error, RuntimeRejected) == final


def test_a_registry_that_hides_is_about_credentials_when_there_are_some():
    error = pull_cause("team/app:1", AUTH, f"{HIDING} {AUTH.password}").error()
    assert "IMAGE_AUTH_FAILED" in str(error)
    assert AUTH.password not in str(error)


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (400, OCI + 'exec: "x": executable file not found in $PATH: unknown', RuntimeRejected),
        (500, OCI + "container init was OOM-killed (memory limit too low?): unknown", RuntimeRejected),
        (500, OCI + "mkdir /x: no space left on device", RuntimeUnavailable),
        (500, "unable to find user nobody: no matching entries in passwd file", RuntimeRejected),
        (500, "connection error: dial unix /run/containerd/containerd.sock: refused", RuntimeUnavailable),
        (500, "something nobody has ever read", AttemptFailed),
        (503, "something nobody has ever read", RuntimeUnavailable),
        (404, "network lan not found", RuntimeRejected),
    ],
)
def test_start(status: int, text: str, kind: type[Exception]):
    assert type(start_verdict(workload(), Refused(status, text))) is kind


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (400, "Minimum memory limit allowed is 6MB", RuntimeRejected),
        (403, "authorization denied by plugin", RuntimeRejected),
        (404, "network lan not found", RuntimeRejected),
        (429, "slow down", RuntimeUnavailable),
        (500, "anything", RuntimeUnavailable),
    ],
)
def test_create(status: int, text: str, kind: type[Exception]):
    refused = Refused(status, text)
    assert not is_image_missing(refused)
    assert type(create_verdict(workload(), refused)) is kind


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("app", ""),
        ("app:1", ""),
        ("team/app", ""),
        ("localhost/app", "localhost"),
        ("localhost:5000/app:1", "localhost:5000"),
        ("r.test/team/app@sha256:0", "r.test"),
    ],
)
def test_the_registry_in_a_reference(image: str, host: str):
    assert registry_of(image) == host


def test_nothing_that_holds_a_secret_shows_it():
    work = workload(env={"TOKEN": "tell-nobody"}, auth=AUTH, limits=Limits())
    options = DockerOptions(installation=work.ref.object_id, sandbox_env={"SITE": "tell-nobody"})
    shown = repr([work, options, container_config(work, options)])
    assert "tell-nobody" not in shown
    assert AUTH.password not in shown


def test_the_credentials_header_is_what_the_engine_reads():
    import base64

    document = msgspec.json.decode(base64.urlsafe_b64decode(credentials_header("r.test/app", AUTH)))
    assert document == {"username": "reader", "password": AUTH.password, "serveraddress": "r.test"}


def test_signatures_of_storage_links_stay_out_of_messages():
    link = "https://storage.test/layer?X-Signature=abcdef"
    error = pull_cause("team/app:1", None, f'Get "{link}": EOF').error()
    assert "abcdef" not in str(error)
    assert "REGISTRY_UNREACHABLE" in str(error)
