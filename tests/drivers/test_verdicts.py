"""The engine's texts, typed. Those without an engine test of their own are of its other image store, or of a network."""

from __future__ import annotations

import msgspec
import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.docker.engine import Refused
from app.runtime.docker.images import registry_of
from app.runtime.docker.options import DockerOptions
from app.runtime.docker.pull import credentials_header
from app.runtime.docker.pull_verdicts import pull_cause
from app.runtime.docker.spec import container_config
from app.runtime.docker.verdicts import create_verdict, power_verdict, remove_verdict, start_verdict
from app.runtime.driver import Image, Power, RegistryAuth
from app.runtime.faults import AgentMissing, AttemptFailed, ImageMissing
from app.runtime.workload import Agent
from tests.drivers.rig import workload

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
    error = pull_cause(Image("team/app:1"), text).error()
    assert getattr(error, "reason", "") == reason
    assert isinstance(error, RuntimeUnavailable) == (reason == "")
    final = reason in ("IMAGE_NOT_FOUND", "IMAGE_AUTH_REQUIRED", "IMAGE_PLATFORM_MISMATCH")
    assert isinstance(error, RuntimeRejected) == final


def test_a_registry_that_hides_is_about_credentials_when_there_are_some():
    error = pull_cause(Image("team/app:1", auth=AUTH), f"{HIDING} {AUTH.password}").error()
    assert "IMAGE_AUTH_FAILED" in str(error)
    assert AUTH.password not in str(error)


def test_a_cause_names_the_image():
    assert "team/app:1" in str(pull_cause(Image("team/app:1"), "manifest unknown").error())


FINAL, ATTEMPT, ENGINE = RuntimeRejected, AttemptFailed, RuntimeUnavailable


@pytest.mark.parametrize(
    ("status", "text", "kind", "reason"),
    [
        # what the request decides
        (400, OCI + 'exec: "tool": executable file not found in $PATH: unknown', FINAL, "ENTRYPOINT_NOT_FOUND"),
        (400, OCI + 'exec: "tool": stat tool: no such file or directory: unknown', FINAL, "ENTRYPOINT_NOT_FOUND"),
        (
            500,
            "crun: executable file `tool` not found in $PATH: No such file or directory",
            FINAL,
            "ENTRYPOINT_NOT_FOUND",
        ),
        (400, OCI + 'exec: "tool": permission denied: unknown', FINAL, "ENTRYPOINT_NOT_EXECUTABLE"),
        (500, OCI + 'exec: "tool": is a directory: unknown', FINAL, "ENTRYPOINT_NOT_EXECUTABLE"),
        (500, OCI + 'exec: "tool": exec format error: unknown', FINAL, "ENTRYPOINT_NOT_EXECUTABLE"),
        (500, "unable to find user nobody: no matching entries in passwd file", FINAL, "START_REJECTED"),
        (500, "unable to find group staff: no matching entries in group file", FINAL, "START_REJECTED"),
        (500, 'could not select device driver "" with capabilities: [[gpu]]', FINAL, "START_REJECTED"),
        # what the host or the operator decides
        (400, OCI + 'exec: "docker-init": executable file not found in $PATH: unknown', ATTEMPT, "START_FAILED"),
        (500, OCI + 'exec: "runc": executable file not found in $PATH: unknown', ATTEMPT, "START_FAILED"),
        (500, OCI + "error running hook #0: exec: no such file or directory", ATTEMPT, "START_FAILED"),
        (500, OCI + "container init was OOM-killed (memory limit too low?): unknown", ATTEMPT, "START_FAILED"),
        (500, OCI + "mkdir /x: no space left on device", ATTEMPT, "START_FAILED"),
        (500, OCI + "too many open files in system", ATTEMPT, "START_FAILED"),
        (500, OCI + "seccomp: config provided but seccomp not supported", ATTEMPT, "START_FAILED"),
        (500, OCI + "apparmor failed to apply profile", ATTEMPT, "START_FAILED"),
        (500, "failed to initialize logging driver: invalid size: 'many'", ATTEMPT, "START_FAILED"),
        (500, OCI + "mkdir /sys/fs/cgroup/pids/docker: cgroup is gone", ATTEMPT, "START_FAILED"),
        (404, "network lan not found", ATTEMPT, "START_FAILED"),
        (400, "something nobody has ever read", ATTEMPT, "START_FAILED"),
        (500, "something nobody has ever read", ATTEMPT, "START_FAILED"),
        # the engine
        (500, "connection error: dial unix /run/containerd/containerd.sock: refused", ENGINE, ""),
        (500, "context deadline exceeded", ENGINE, ""),
        (503, "something nobody has ever read", ENGINE, ""),
        (403, "authorization denied by plugin gate", ENGINE, ""),
        (401, "who are you", ENGINE, ""),
        (429, "slow down", ENGINE, ""),
    ],
)
def test_start(status: int, text: str, kind: type[Exception], reason: str):
    error = start_verdict(workload(entrypoint=("tool", "x")), Refused(status, text))
    assert (type(error), getattr(error, "reason", "")) == (kind, reason)
    assert text in str(error)


@pytest.mark.parametrize(
    ("status", "text", "kind", "reason"),
    [
        (400, "Minimum memory limit allowed is 6MB", FINAL, "SPEC_REJECTED"),
        (400, "Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available", FINAL, "SPEC_REJECTED"),
        (400, "invalid reference format: repository name must be lowercase", FINAL, "IMAGE_REFERENCE_INVALID"),
        (400, 'invalid CapAdd: unknown capability: "CAP_X"', ATTEMPT, "START_FAILED"),
        (400, "something nobody has ever read", ATTEMPT, "START_FAILED"),
        (404, "network lan not found", ATTEMPT, "START_FAILED"),
        (500, "mkdir /var/lib/docker/x: no space left on device", ATTEMPT, "START_FAILED"),
        (500, "invalid reference format", ATTEMPT, "START_FAILED"),
        (404, "No such image: team/app:1", ImageMissing, ""),
        (404, "image with reference a was found but does not match the specified platform", ImageMissing, ""),
        (403, "authorization denied by plugin", ENGINE, ""),
        (429, "slow down", ENGINE, ""),
        (502, "anything", ENGINE, ""),
    ],
)
def test_create(status: int, text: str, kind: type[Exception], reason: str):
    error = create_verdict(workload(), Refused(status, text))
    assert (type(error), getattr(error, "reason", "")) == (kind, reason)
    assert text in str(error)


@pytest.mark.parametrize(
    ("status", "text", "kind", "reason"),
    [
        (
            500,
            "Cannot pause container x: OCI runtime pause failed: unable to freeze: unknown",
            ATTEMPT,
            "PAUSE_REFUSED",
        ),
        (409, "container x is not running", ATTEMPT, "PAUSE_REFUSED"),
        (500, "Cannot pause container x: cgroup freezer not supported", FINAL, "PAUSE_NOT_SUPPORTED"),
        (501, "pause: not implemented", FINAL, "PAUSE_NOT_SUPPORTED"),
        (503, "anything", ENGINE, ""),
        (403, "anything", ENGINE, ""),
    ],
)
def test_pause(status: int, text: str, kind: type[Exception], reason: str):
    error = power_verdict(Power.PAUSED, "x", Refused(status, text))
    assert (type(error), getattr(error, "reason", "")) == (kind, reason)


def test_remove():
    busy = "driver overlay2 failed to remove root filesystem: unlinkat /x: device or resource busy"
    error = remove_verdict("x", Refused(500, busy))
    assert isinstance(error, AttemptFailed)
    assert error.reason == "REMOVE_REFUSED"
    assert busy in error.message
    assert type(remove_verdict("x", Refused(503, busy))) is RuntimeUnavailable


def test_values_are_taken_out_of_the_engines_words_also_where_it_quotes_them():
    work = workload(env={"A": 'say "please"', "B": "two\nlines", "C": "abc"})
    text = 'bad: say "please", "say \\"please\\"", "two\\nlines", two\nlines, abc'
    error = create_verdict(work, Refused(500, text))
    assert "please" not in str(error)
    assert "lines" not in str(error)
    assert "abc" in str(error), "too short to be searched for"


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
    work = workload(env={"TOKEN": "tell-nobody"}, auth=AUTH)
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
    error = pull_cause(Image("team/app:1"), f'Get "{link}": EOF').error()
    assert "abcdef" not in str(error)
    assert "REGISTRY_UNREACHABLE" in str(error)


AGENT = Agent("sandledger-agent-x", "t0ken-of-a-sandbox")
BOOTSTRAP = "/opt/opensandbox/bin/bootstrap.sh"


@pytest.mark.parametrize(
    "text",
    [
        "driver failed programming external connectivity on endpoint x: Bind for 127.0.0.1:40000 failed: port is already allocated",
        "driver failed programming external connectivity on endpoint x: all ports are allocated",
        "driver failed programming external connectivity: listen tcp4 127.0.0.1:40000: bind: address already in use",
    ],
)
@pytest.mark.parametrize(("port_range", "advice"), [("", "no free port"), ("40000-40003", "range 40000-40003 is full")])
def test_a_port_that_is_taken(text: str, port_range: str, advice: str):
    verdict = start_verdict(workload(agent=AGENT), Refused(500, text), port_range)
    assert isinstance(verdict, AttemptFailed)
    assert verdict.reason == "PORTS_EXHAUSTED"
    assert advice in verdict.message
    assert ("widen docker.port_range_min" in verdict.message) == bool(port_range)


def test_an_agent_that_is_not_in_its_volume():
    text = f'{OCI}exec: "{BOOTSTRAP}": stat {BOOTSTRAP}: no such file or directory: unknown'
    assert isinstance(start_verdict(workload(agent=AGENT), Refused(400, text)), AgentMissing)


def test_an_agent_that_cannot_be_executed_ends_no_sandbox():
    text = f'{OCI}exec: "{BOOTSTRAP}": permission denied: unknown'
    verdict = start_verdict(workload(agent=AGENT), Refused(400, text))
    assert isinstance(verdict, AttemptFailed)
    assert not isinstance(verdict, AgentMissing)
    assert verdict.reason == "START_FAILED"


def test_the_token_is_in_no_message():
    text = f"invalid environment variable: EXECD_ACCESS_TOKEN={AGENT.token}"
    assert AGENT.token not in str(create_verdict(workload(agent=AGENT), Refused(400, text)))
    assert AGENT.token not in str(start_verdict(workload(agent=AGENT), Refused(500, text)))
