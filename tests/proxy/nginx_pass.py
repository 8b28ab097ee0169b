"""Which tests of the proxy are not run through nginx, and why. All others are; `make test` runs a core of them."""

from __future__ import annotations

from collections.abc import Iterable

from tests.proxy import rig

CORE = frozenset(
    (
        "test_the_rest_of_the_path_arrives_as_it_was_sent",
        "test_through_sockets_nothing_is_added_and_nothing_lost",
        "test_what_two_servers_could_read_differently_is_refused",
        "test_a_cut_body_is_seen_to_be_cut",
        "test_a_key_is_asked_for",
        "test_the_head_is_passed_on_and_then_bytes",
    )
)
OWN_LIMITS = "nginx has its own limits and times"
COUNTED = "it looks at the streams of our server, and nginx carries them"
NOT_CUT = "nginx does not know that a sandbox ended or was started again: the end of the container cuts its streams"
OWN_CONNECTIONS = "nginx makes a new connection to the sandbox for each request"
OWN_CLIENT_SIDE = "nginx keeps the client's connection by its own rules, and takes what follows for the next request"
LENIENT = "nginx takes what our server refuses, and writes it anew: one request stays one request, and one answer one"
EXCEPTIONS: dict[str, str] = {
    "test_every_method_is_passed_on": "nginx refuses TRACE",
    "test_the_next_owner_of_an_address_is_found_out": "what may act is not sent twice, see test_nginx",
    "test_the_programs_own_401_is_its_own": "its challenge stands twice",
    "test_the_origin_is_the_sandboxs_own": "nginx empties the domain of a cookie and leaves the word",
    "test_refusals_are_the_same": "nginx itself refuses two of Host",
    "test_an_answer_arrives_with_its_own_headers_only": "nginx adds Server, and has an order of its own",
    "test_a_websocket_by_host": OWN_CLIENT_SIDE,
    "test_a_thousand_silent_streams": COUNTED,
    "test_the_api_at_its_limit_takes_no_place_of_streams": OWN_LIMITS,
    "test_more_streams_than_allowed": OWN_LIMITS,
    "test_a_sandbox_that_says_nothing_is_504": OWN_LIMITS,
    "test_a_stream_that_stands_still_is_cut_where_the_operator_wants_it": OWN_LIMITS,
    "test_a_client_of_http_1_0_sees_a_cut_too": "nginx answers HTTP/1.0 without a framing",
    "test_an_answer_before_the_body_is_passed_on_at_once": OWN_CLIENT_SIDE,
    "test_a_refusal_reaches_a_client_that_still_sends": OWN_CLIENT_SIDE,
    "test_100_continue_comes_from_a_sandbox_that_is_there": "nginx says 100 itself",
    "test_a_slow_head_has_an_end": OWN_LIMITS,
    "test_reads_keep_a_connection_and_writes_do_not": OWN_CONNECTIONS,
    "test_a_kept_connection_that_had_ended_costs_nothing": OWN_CONNECTIONS,
    "test_a_new_connection_that_ends_is_not_tried_again": "a read is asked again by our server, see test_nginx",
    "test_a_line_that_ends_with_lf_alone_is_refused": LENIENT,
    "test_a_chunk_of_a_wrong_kind_is_no_end_of_a_request": LENIENT,
    "test_what_is_no_answer_is_502": LENIENT,
    "test_interim_answers_are_passed_over": "nginx takes an interim answer that nobody asked for as the answer",
    "test_refusals_are_answers_of_http": OWN_CLIENT_SIDE,
    "test_a_page_of_another_origin_gets_none_without_a_key": OWN_CLIENT_SIDE,
    "test_a_place_is_taken_until_the_end": COUNTED,
    "test_a_program_that_does_not_accept_is_heard": OWN_CLIENT_SIDE,
    "test_a_program_that_says_nothing_is_504": OWN_LIMITS,
    "test_101_that_was_not_asked_for_is_no_answer": LENIENT,
    "test_other_upgrades_are_requests_without_one": "of several Upgrade, nginx shows the first",
    "test_a_handshake_behind_a_request_under_way_is_none": "nginx takes one request after another",
    "test_a_head_in_pieces_is_a_head": OWN_LIMITS,
    "test_more_than_a_client_may_send_before_the_answer": OWN_LIMITS,
    "test_half_an_end_leaves_the_other_direction": "nginx passes no half of an end on",
    "test_a_program_that_ignores_the_end_is_left": OWN_LIMITS,
    "test_a_side_that_does_not_read_holds_the_other_back": COUNTED,
    "test_a_side_that_takes_nothing_is_given_up": OWN_LIMITS,
    "test_a_side_that_takes_little_is_not_given_up": OWN_LIMITS,
    "test_the_end_of_a_sandbox_cuts_its_streams": NOT_CUT,
    "test_a_row_of_a_newer_version_keeps_no_other_stream_alive": NOT_CUT,
    "test_another_start_cuts_the_streams_of_the_last": NOT_CUT,
    "test_a_pause_leaves_its_streams": NOT_CUT,
    "test_streams_live_while_the_database_is_away": NOT_CUT,
    "test_bytes_are_counted_in_both_directions": COUNTED,
    "test_an_open_silent_stream_is_no_activity": COUNTED,
    "test_a_stop_writes_what_is_left": COUNTED,
    "test_slow_clients_harm_nobody_else": COUNTED,
    "test_a_revocation_ends_streams_on_every_server": COUNTED,
    "test_those_of_answers_neither": "nginx takes the trailers away and leaves the word Trailer",
    "test_trailers_without_end_cost_no_memory": "nginx reads them for as long as they come, and keeps none",
    "test_every_header_that_may_be_forged": "nginx drops names with _; test_nginx has headers of its own",
    "test_nothing_listens_on_the_port": "nginx passes the agent's words on",
}
REFUSED_PATHS = frozenset(("/a%00b", "/a%", "/a%zz"))
"""nginx answers 400: it decodes each path, though it passes on what came. These are no text."""
ABOVE_ROOT = frozenset(("/../../../health", "/%2e%2e/%2e%2e/health"))
"""The same where the program has a host of its own."""


def passed(paths: Iterable[str], *, by_host: bool = False) -> list[str]:
    """Those that reach the sandbox by the way that this test goes."""
    refused = REFUSED_PATHS | (ABOVE_ROOT if by_host else set()) if rig.through == "nginx" else set()
    return [path for path in paths if path not in refused]
