"""The forms of an endpoint, as a table: the head row, the operator's settings and one lookup in, one answer out."""

from __future__ import annotations

from uuid import UUID

import pytest
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.endpoints import Asked, Endpoint, Network, has_agent, is_awaited, not_yet, resolve
from app.domain.sandbox.observed import Address, Exit, Power, Waiting
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.sandbox.status import Attempt
from app.errors import Conflict, NotFound, Rejected, Unsupported
from tests.support.stream import Stream

TOKEN = "t0ken"
AGENT = Network(agent=True)
BARE = Network()
PUBLISHED = Address("bridge", "172.17.0.2", {"44772": "127.0.0.1:32768", "8080": "127.0.0.1:32769"})
UNPUBLISHED = Address("bridge", "172.17.0.2")
HOST = Address("host")
WITH_TOKEN = {"Sandledger-Generation": "1", "X-EXECD-ACCESS-TOKEN": TOKEN}
PLAIN = {"Sandledger-Generation": "1"}


def published(at: str) -> Address:
    return Address("bridge", "172.17.0.2", {"44772": f"{at}:32768", "8080": f"{at}:32769"})


def pending() -> Sandbox:
    return Stream().sandbox


def created() -> Sandbox:
    return Stream().observe(Power.CREATED).sandbox


def running(address: Address | None = PUBLISHED) -> Sandbox:
    return Stream().observe(Power.RUNNING, address=address).sandbox


def ask(port: int, network: Network = AGENT, address: Address | None = PUBLISHED, **asked: object) -> Endpoint:
    lookup = Asked(port, host="api.test:8080", mount="/v1", **asked)  # pyright: ignore[reportArgumentType]
    return resolve(running(address), lookup, network, TOKEN)


def refusal(sandbox: Sandbox, port: int, network: Network = AGENT, *, through_server: bool = False) -> Rejected:
    with pytest.raises(Rejected) as caught:
        resolve(sandbox, Asked(port, through_server, "api.test"), network, TOKEN)
    return caught.value


class TestForms:
    @pytest.mark.parametrize(
        ("port", "address", "endpoint", "headers"),
        [
            (44772, PUBLISHED, "127.0.0.1:32768/proxy/44772", WITH_TOKEN),
            (18080, PUBLISHED, "127.0.0.1:32768/proxy/18080", WITH_TOKEN),
            (3000, PUBLISHED, "127.0.0.1:32768/proxy/3000", WITH_TOKEN),
            (1, PUBLISHED, "127.0.0.1:32768/proxy/1", WITH_TOKEN),
            (65535, PUBLISHED, "127.0.0.1:32768/proxy/65535", WITH_TOKEN),
            (8080, PUBLISHED, "127.0.0.1:32769", PLAIN),
            (8080, Address("bridge", "1.2.3.4", {"44772": "127.0.0.1:1"}), "127.0.0.1:1/proxy/8080", WITH_TOKEN),
            (3000, Address("named", "10.9.0.2", {"44772": "[::1]:7"}), "[::1]:7/proxy/3000", WITH_TOKEN),
            (44772, HOST, "127.0.0.1:44772", WITH_TOKEN),
            (8080, HOST, "127.0.0.1:8080", PLAIN),
            (3000, HOST, "127.0.0.1:3000", PLAIN),
        ],
    )
    def test_direct(self, port: int, address: Address, endpoint: str, headers: dict[str, str]):
        assert ask(port, address=address) == Endpoint(endpoint, headers)

    def test_the_generation_is_that_of_the_present_object(self):
        assert resolve(replace(running(), generation=3), Asked(8080), AGENT, TOKEN).headers == {
            "Sandledger-Generation": "3"
        }

    @pytest.mark.parametrize("address", [PUBLISHED, HOST])
    @pytest.mark.parametrize("port", [44772, 8080, 3000])
    @pytest.mark.parametrize(
        ("network", "base"),
        [
            (AGENT, "api.test:8080/v1"),
            (replace(AGENT, eip="edge.test:8443/x/"), "edge.test:8443/x"),
            (replace(AGENT, eip="https://edge.test/"), "edge.test"),
            (replace(AGENT, public_address="https://proxy.test/y"), "proxy.test/y"),
            (replace(AGENT, eip="edge.test", public_address="proxy.test"), "proxy.test"),
        ],
    )
    def test_through_the_server_without_a_token(self, address: Address, port: int, network: Network, base: str):
        found = ask(port, network, address, through_server=True)
        assert found == Endpoint(f"{base}/sandboxes/{running().id}/proxy/{port}", PLAIN)

    def test_with_a_wildcard_each_port_has_a_host(self):
        network = replace(AGENT, wildcard="boxes.test:8443", eip="edge.test", public_address="proxy.test")
        found = ask(3000, network, through_server=True)
        assert found == Endpoint(f"3000-{running().id}.boxes.test:8443", PLAIN)
        assert ask(3000, network).address == "edge.test:32768/proxy/3000", "direct endpoints are the same"

    def test_through_an_open_proxy_the_caller_brings_the_token(self):
        open_proxy = replace(AGENT, open_proxy=True)
        assert ask(3000, open_proxy, through_server=True).headers == WITH_TOKEN
        assert ask(3000, replace(BARE, open_proxy=True), UNPUBLISHED, through_server=True).headers == PLAIN

    def test_the_prefix_is_the_one_that_was_used(self):
        found = resolve(running(), Asked(1, through_server=True, host="h"), AGENT, TOKEN)
        assert found.address == f"h/sandboxes/{running().id}/proxy/1"

    def test_no_repr_shows_the_token(self):
        assert TOKEN not in repr(ask(3000))


class TestHost:
    @pytest.mark.parametrize(
        ("network", "at", "host"),
        [
            (Network(), "127.0.0.1", "127.0.0.1"),
            (Network(listens_on="0.0.0.0", outbound="10.0.0.9"), "127.0.0.1", "127.0.0.1"),
            (Network(listens_on="0.0.0.0", outbound="10.0.0.9"), "0.0.0.0", "10.0.0.9"),
            (Network(listens_on="::", outbound="10.0.0.9"), "[::]", "10.0.0.9"),
            (Network(listens_on="0.0.0.0", outbound="10.0.0.9"), "10.0.0.7", "10.0.0.7"),
            (Network(listens_on="0.0.0.0", outbound="10.0.0.9"), "[fd00::1]", "[fd00::1]"),
            (Network(listens_on="10.0.0.5"), "0.0.0.0", "10.0.0.5"),
            (Network(listens_on="box.test"), "0.0.0.0", "box.test"),
            (Network(listens_on="fd00::5"), "0.0.0.0", "[fd00::5]"),
            (Network(host_ip="10.0.0.2"), "127.0.0.1", "10.0.0.2"),
            (Network(host_ip="10.0.0.2", listens_on="localhost"), "0.0.0.0", "10.0.0.2"),
            (Network(host_ip="10.0.0.2", listens_on="0.0.0.0"), "0.0.0.0", "10.0.0.2"),
            (Network(host_ip="fd00::2", listens_on="::"), "0.0.0.0", "[fd00::2]"),
            (Network(host_ip="10.0.0.2", listens_on="10.0.0.5"), "0.0.0.0", "10.0.0.5"),
            (Network(eip="edge.test", host_ip="10.0.0.2"), "127.0.0.1", "edge.test"),
            (Network(eip="edge.test:8443/x"), "127.0.0.1", "edge.test"),
            (Network(eip="http://edge.test"), "127.0.0.1", "edge.test"),
            (Network(eip="198.51.100.1"), "0.0.0.0", "198.51.100.1"),
            (Network(eip="[fd00::3]:8443"), "0.0.0.0", "[fd00::3]"),
            (Network(eip="fd00::3"), "0.0.0.0", "[fd00::3]"),
        ],
    )
    def test_of_published_ports(self, network: Network, at: str, host: str):
        assert ask(8080, network, published(at)).address == f"{host}:32769"

    @pytest.mark.parametrize(
        ("network", "host"),
        [
            (Network(), "127.0.0.1"),
            (Network(listens_on="0.0.0.0", outbound="10.0.0.9"), "10.0.0.9"),
            (Network(listens_on="10.0.0.5"), "10.0.0.5"),
            (Network(host_ip="10.0.0.2", listens_on="0.0.0.0"), "10.0.0.2"),
            (Network(eip="edge.test/x"), "edge.test"),
        ],
    )
    def test_of_the_host_network(self, network: Network, host: str):
        assert ask(3000, network, HOST).address == f"{host}:3000"


class TestStates:
    @pytest.mark.parametrize("state", [pending, created])
    @pytest.mark.parametrize("port", [44772, 18080, 8080, 3000])
    def test_a_pending_one_is_waited_for(self, state, port: int):
        assert is_awaited(state(), Asked(port), AGENT)
        assert is_awaited(state(), Asked(port, through_server=True), AGENT)

    def test_what_needs_no_agent_is_there_as_soon_as_it_has_an_address(self):
        up = replace(running(), ready_at=None)
        assert up.phase is Phase.PENDING
        assert [is_awaited(up, Asked(port), AGENT) for port in (8080, 3000, 44772)] == [False, True, True]
        assert resolve(up, Asked(8080), AGENT, TOKEN).address == "127.0.0.1:32769"
        on_host = replace(up, address=HOST)
        assert [is_awaited(on_host, Asked(port), AGENT) for port in (8080, 3000, 44772)] == [False, False, True]

    def test_nobody_waits_for_the_agent_of_a_server_that_has_none(self):
        assert not is_awaited(pending(), Asked(44772), BARE)
        assert is_awaited(pending(), Asked(3000), BARE)

    def test_paused_ones_keep_their_endpoints(self):
        stream = Stream().observe(Power.RUNNING, address=PUBLISHED).after(cmd.Pause())
        for phase in (Phase.PAUSING, Phase.PAUSED):
            assert stream.sandbox.phase is phase
            assert not is_awaited(stream.sandbox, Asked(44772), AGENT)
            assert resolve(stream.sandbox, Asked(44772), AGENT, TOKEN).headers == WITH_TOKEN
            stream.observe(Power.PAUSED)

    def test_what_is_still_pending_says_what_it_waits_for(self):
        waits = Stream().after(cmd.RecordWaiting("fetch", "IMAGE_PULLING", "Image x is being pulled.")).sandbox
        found = not_yet(waits, Attempt(progress="1 of 2 layers"))
        assert isinstance(found, NotFound)
        assert found.code == "KUBERNETES::POD_IP_NOT_AVAILABLE"
        assert found.message == "The sandbox is Pending (IMAGE_PULLING): Image x is being pulled. 1 of 2 layers."

    @pytest.mark.parametrize("through_server", [False, True])
    @pytest.mark.parametrize("port", [44772, 8080])
    def test_a_failed_one_answers_with_the_reason(self, port: int, through_server: bool):
        failed = Stream().after(cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "No such image.")).sandbox
        for network in (AGENT, BARE):
            found = refusal(failed, port, network, through_server=through_server)
            assert isinstance(found, Conflict)
            assert found.code == "DOCKER::SANDBOX_NOT_RUNNING"
            assert found.message == "The sandbox is Failed (IMAGE_NOT_FOUND): No such image."

    def test_one_that_ended_by_itself_says_how(self):
        ended = Stream().observe(Power.RUNNING, address=PUBLISHED).observe(Power.EXITED, end=Exit(0)).sandbox
        assert "Terminated (CONTAINER_EXITED): Sandbox container exited" in refusal(ended, 8080).message

    def test_a_deleted_one_says_when_and_by_whom(self):
        gone = Stream().observe(Power.RUNNING, address=PUBLISHED).after(cmd.Terminate()).sandbox
        assert not is_awaited(gone, Asked(44772), AGENT)
        found = refusal(gone, 44772)
        assert isinstance(found, NotFound)
        assert found.code == "DOCKER::SANDBOX_NOT_FOUND"
        assert "deleted by api_key default at 2026-03-01T12:00:00Z" in found.message

    def test_one_without_an_address_has_no_endpoint(self):
        found = refusal(running(None), 3000, through_server=True)
        assert found.code == "KUBERNETES::POD_IP_NOT_AVAILABLE"


class TestWithoutAgent:
    @pytest.mark.parametrize("through_server", [False, True])
    def test_its_port_is_not_there(self, through_server: bool):
        for sandbox, network in ((pending(), BARE), (running(UNPUBLISHED), BARE), (running(HOST), BARE)):
            found = refusal(sandbox, 44772, network, through_server=through_server)
            assert isinstance(found, Unsupported)
            assert found.code == "SANDBOX::AGENT_NOT_AVAILABLE"
            assert "runtime.execd_image" in found.message

    def test_a_sandbox_from_before_the_agent_is_told_apart(self):
        assert "made without an agent" in refusal(running(UNPUBLISHED), 44772, AGENT).message

    def test_a_sandbox_keeps_its_agent_when_the_setting_goes(self):
        assert ask(44772, BARE).address == "127.0.0.1:32768/proxy/44772"
        assert has_agent(running(), BARE)
        assert not has_agent(running(UNPUBLISHED), AGENT)

    @pytest.mark.parametrize("port", [8080, 3000, 18080])
    def test_other_ports_are_reached_through_the_server_only(self, port: int):
        found = refusal(running(UNPUBLISHED), port, BARE)
        assert (type(found), found.code) == (Unsupported, "SANDBOX::AGENT_NOT_AVAILABLE")
        assert f"Port {port} is not published" in found.message
        assert "runtime.execd_image" in found.message
        assert ask(port, BARE, UNPUBLISHED, through_server=True).headers == PLAIN

    def test_on_the_host_network_they_are_reached(self):
        assert ask(3000, BARE, HOST) == Endpoint("127.0.0.1:3000", PLAIN)


class TestUnreachableAgent:
    """A Running sandbox whose agent does not answer waits in the step `probe`."""

    @staticmethod
    def silent(reason: str) -> Sandbox:
        return replace(running(), waiting=Waiting("probe", reason, "tried 172.17.0.2:44772"))

    @pytest.mark.parametrize(
        "reason", ["AGENT_NOT_LISTENING", "AGENT_OF_ANOTHER", "PORT_TAKEN_IN_IMAGE", "AGENT_SILENT"]
    )
    @pytest.mark.parametrize("through_server", [False, True])
    def test_ports_behind_it_are_refused_with_the_reason(self, reason: str, through_server: bool):
        found = refusal(self.silent(reason), 3000, through_server=through_server)
        assert (type(found), found.code) == (Conflict, "SANDBOX::AGENT_UNREACHABLE")
        assert found.message == f"The agent cannot be reached ({reason}): tried 172.17.0.2:44772"

    @pytest.mark.parametrize("reason", ["NETWORK_NOT_REACHABLE", "ADVERTISED_NOT_REACHABLE"])
    def test_where_only_the_probe_cannot_reach_it_the_client_may(self, reason: str):
        assert resolve(self.silent(reason), Asked(44772), AGENT, TOKEN).headers == WITH_TOKEN

    def test_a_published_port_does_not_need_it(self):
        assert resolve(self.silent("AGENT_SILENT"), Asked(8080), AGENT, TOKEN).address == "127.0.0.1:32769"


def test_ids_are_in_their_usual_spelling():
    sandbox = replace(running(), id=UUID("0198F000-0000-7000-8000-000000000001"))
    found = resolve(sandbox, Asked(1, through_server=True, host="h"), AGENT, TOKEN)
    assert found.address == "h/sandboxes/0198f000-0000-7000-8000-000000000001/proxy/1"
