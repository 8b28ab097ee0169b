"""Which tests of the proxy are not run through nginx, and why."""

from __future__ import annotations

CORE: frozenset[str] = frozenset()
OWN_LIMITS = "nginx has its own limits and times"
COUNTED = "it looks at the streams of our server, and nginx carries them"
OWN_CONNECTIONS = "nginx makes a new connection to the sandbox for each request"
OWN_CLIENT_SIDE = "nginx keeps the client's connection by its own rules"
EXCEPTIONS: dict[str, str] = {
    "test_every_method_is_passed_on": "nginx refuses TRACE",
    "test_the_next_owner_of_an_address_is_found_out": "what may act is not sent twice, see test_nginx",
    "test_the_programs_own_401_is_its_own": "its challenge stands twice",
    "test_the_origin_is_the_sandboxs_own": "nginx empties the domain of a cookie and leaves the word",
    "test_a_websocket_by_host": OWN_CLIENT_SIDE,
    "test_a_thousand_silent_streams": COUNTED,
    "test_the_api_at_its_limit_takes_no_place_of_streams": OWN_LIMITS,
    "test_more_streams_than_allowed": OWN_LIMITS,
    "test_a_sandbox_that_says_nothing_is_504": OWN_LIMITS,
    "test_a_stream_that_stands_still_is_cut_where_the_operator_wants_it": OWN_LIMITS,
    "test_a_client_of_http_1_0_sees_a_cut_too": "nginx answers HTTP/1.0 without a framing",
    "test_an_answer_before_the_body_is_passed_on_at_once": OWN_CLIENT_SIDE,
    "test_100_continue_comes_from_a_sandbox_that_is_there": "nginx says 100 itself",
    "test_a_slow_head_has_an_end": OWN_LIMITS,
    "test_reads_keep_a_connection_and_writes_do_not": OWN_CONNECTIONS,
    "test_a_kept_connection_that_had_ended_costs_nothing": OWN_CONNECTIONS,
    "test_a_new_connection_that_ends_is_not_tried_again": "a read is asked again by our server, see test_nginx",
}
REFUSED_PATHS = frozenset(("/a%00b", "/a%", "/a%zz"))
"""nginx answers 400: it decodes each path, though it passes on what came. These are no text."""
ABOVE_ROOT = frozenset(("/../../../health", "/%2e%2e/%2e%2e/health"))
"""The same where the program has a host of its own."""
