"""A stand-in for the agent of a sandbox (OpenSandbox's execd), for tests. Standard library only.

It answers on the paths that the public SDKs use: `/ping`, `/command` (the stream of events that they read), `/session`,
`/files`, `/directories`, `/metrics`, and `/proxy/<port>/...` to programs inside the sandbox. With EXECD_ACCESS_TOKEN
set, every path wants it in the header X-EXECD-ACCESS-TOKEN. What it does not have is 404.

Faults, by environment: STANDIN_SILENT (accepts, never answers), STANDIN_TOKEN (wants this token instead),
STANDIN_LATE_SECONDS, STANDIN_DIES_AFTER (so many requests), STANDIN_OTHER (some other service that has the port).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

sys.modules["ssl"] = None  # type: ignore[assignment] - not needed, and it would bring large libraries
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # noqa: E402
from urllib.parse import parse_qs, quote, unquote  # noqa: E402

import files  # noqa: E402
from commands import COMMANDS, ENV, SESSIONS, Command, Say, Session, lines_of  # noqa: E402

TOKEN = ENV.get("STANDIN_TOKEN") or ENV.get("EXECD_ACCESS_TOKEN", "")
SILENT, OTHER, DIES_AFTER = "STANDIN_SILENT" in ENV, "STANDIN_OTHER" in ENV, int(ENV.get("STANDIN_DIES_AFTER", "0"))
CHUNK = 1 << 16
LOOK_SECONDS, LOOKS_A_PING = 0.25, 12
"""How often the client is looked for, and how many such looks are between two pings."""
PER_CONNECTION = {"connection", "upgrade", "keep-alive", "te", "transfer-encoding", "content-length"}
DROPPED = PER_CONNECTION | {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}
INTERIM, SWITCHING = (b"HTTP/1.1 100", b"HTTP/1.1 102", b"HTTP/1.1 103"), b"HTTP/1.1 101"
REQUESTS = itertools.count(1)


class Agent(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def any_method(self) -> None:
        if DIES_AFTER and next(REQUESTS) > DIES_AFTER:
            os._exit(1)
        if SILENT:
            threading.Event().wait()
        if OTHER:
            return self.reply(404, b"nobody you know", "text/plain")
        if TOKEN and self.headers.get("X-EXECD-ACCESS-TOKEN") != TOKEN:
            return self.refuse(401, "UNAUTHORIZED", "the access token is missing or wrong")
        path, mark, query = self.path.partition("?")
        if path.startswith("/proxy/"):
            port, _, rest = path.removeprefix("/proxy/").partition("/")
            return self.proxy(port, "/" + rest, mark + query)
        self.query = parse_qs(query)
        name = f"{self.command.lower()}{path.replace('/', '_')}"
        first, *rest = unquote(path).strip("/").split("/")
        try:
            if (handler := getattr(self, name, None)) is not None:
                return handler()
            if first == "command" and self.command == "GET" and rest:
                return self.about_command(rest)
            if first == "session" and rest:
                return self.in_session(rest)
            return self.refuse(404, "NOT_FOUND", f"the stand-in has no {self.command} {path}")
        except FileNotFoundError as error:
            return self.refuse(404, "FILE_NOT_FOUND", str(error))
        except (ValueError, KeyError) as error:
            return self.refuse(400, "INVALID_REQUEST_BODY", repr(error))
        except ConnectionError:
            raise
        except (OSError, TypeError) as error:
            return self.refuse(500, "RUNTIME_ERROR", repr(error))

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self.any_method
        raise AttributeError(name)

    # answers

    def reply(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def reply_json(self, shown: object) -> None:
        self.reply(200, json.dumps(shown).encode())

    def refuse(self, status: int, code: str, message: str) -> None:
        self.close_connection = True  # the body may not have been read
        self.reply(status, json.dumps({"code": code, "message": message}).encode(), Connection="close")

    @contextmanager
    def stream(self, gone: Callable[[], None] | None = None) -> Iterator[Say]:
        """A chunked answer of events: JSON, each followed by an empty line. With `gone` there are pings beside them, and
        it is called when the client has left."""
        lock, done = threading.Lock(), threading.Event()
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")):
            self.send_header(name, value)
        self.end_headers()

        def say(**event: object) -> None:
            data = json.dumps({"timestamp": int(time.time() * 1000), **event}).encode() + b"\n\n"
            with lock:
                if not done.is_set():
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def watch(gone: Callable[[], None]) -> None:
            looks = itertools.count(1)
            try:
                while not done.wait(LOOK_SECONDS):
                    if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                        return gone()
                    if next(looks) % LOOKS_A_PING == 0:
                        say(type="ping", text="pong")
            except (OSError, ValueError):
                gone()

        if gone is not None:
            threading.Thread(target=watch, args=(gone,), daemon=True).start()
        try:
            yield say
        finally:
            with lock:
                done.set()  # nothing follows the end
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (data := self.rfile.read1(min(left, CHUNK))):
            left -= len(data)
            yield data

    def document(self):
        return json.loads(b"".join(self.body()))

    # paths

    def get_ping(self) -> None:
        self.reply(200)

    def get_metrics(self) -> None:
        self.reply_json(_metrics())

    def get_metrics_watch(self) -> None:
        with self.stream() as say:
            while True:
                say(**_metrics())
                time.sleep(1)

    def post_command(self) -> None:
        request = self.document()
        command = Command.of(request)
        if request.get("background"):
            threading.Thread(target=command.run, args=(lambda **_: None,), daemon=True).start()
            with self.stream() as say:
                say(type="init", text=command.id)
                say(type="execution_complete", execution_time=0)
        else:
            self.follow(command)

    def follow(self, command: Command) -> None:
        with self.stream(command.kill) as say:
            say(type="init", text=command.id)
            command.run(say)

    def delete_command(self) -> None:
        COMMANDS[self.query["id"][0]].kill()
        self.reply(200)

    def about_command(self, rest: list[str]) -> None:
        command = COMMANDS.get(rest[-1] if rest[0] == "status" else rest[0])
        if command is None:
            return self.refuse(404, "NOT_FOUND", "no such command")
        if rest[-1] != "logs":
            return self.reply_json(command.status())
        output = list(command.output)
        content = "".join(output[int(self.query.get("cursor", ["0"])[0]) :]).encode()
        return self.reply(200, content, "text/plain", EXECD_COMMANDS_TAIL_CURSOR=str(len(output)))

    def post_session(self) -> None:
        asked = b"".join(self.body())
        self.reply_json({"session_id": Session((json.loads(asked) if asked else {}).get("cwd")).id})

    def in_session(self, rest: list[str]) -> None:
        session = SESSIONS.get(rest[0])
        if session is None:
            return self.refuse(404, "CONTEXT_NOT_FOUND", "no such session")
        if self.command == "POST" and rest[1:] == ["run"]:
            return self.follow(session.command(self.document()))
        session.end()
        return self.reply(200)

    def post_files_upload(self) -> None:
        files.upload(self.headers["Content-Type"], b"".join(self.body()))
        self.reply(200)

    def get_files_download(self) -> None:
        first, count = (int(self.query[name][0]) if name in self.query else None for name in ("offset", "limit"))
        content, kind = files.read(self.query["path"][0], first, count), "application/octet-stream"
        if "Range" not in self.headers:
            return self.reply(200, content, kind)
        try:
            begin, end = files.span(self.headers["Range"], len(content))
        except ValueError as error:
            return self.refuse(416, "UNKNOWN", str(error))
        return self.reply(206, content[begin : end + 1], kind, Content_Range=f"bytes {begin}-{end}/{len(content)}")

    def get_files_info(self) -> None:
        self.reply_json({path: files.info(path) for path in self.query.get("path", [])})

    def get_files_search(self) -> None:
        self.reply_json(files.search(self.query["path"][0], self.query.get("pattern", ["*"])[0]))

    def post_files_permissions(self) -> None:
        for path, wanted in self.document().items():
            files.set_permissions(path, wanted)
        self.reply(200)

    def post_files_mv(self) -> None:
        for each in self.document():
            files.move(each["src"], each["dest"])
        self.reply(200)

    def post_files_replace(self) -> None:
        changes = self.document().items()
        counts = {path: {"replacedCount": files.replace(path, each["old"], each["new"])} for path, each in changes}
        if self.query.get("verbose") == ["true"]:
            return self.reply_json(counts)
        return self.reply(200)

    def delete_files(self) -> None:
        for path in self.query.get("path", []):
            files.remove_file(path)
        self.reply(200)

    def get_directories_list(self) -> None:
        self.reply_json(list(files.entries(self.query["path"][0], int(self.query.get("depth", ["1"])[0]))))

    def post_directories(self) -> None:
        for path, wanted in self.document().items():
            files.make_folder(path, wanted)
        self.reply(200)

    def delete_directories(self) -> None:
        for path in self.query.get("path", []):
            files.remove_folder(path)
        self.reply(200)

    # to a program in the sandbox

    def proxy(self, port: str, path: str, query: str) -> None:
        self.close_connection = True
        try:
            backend = socket.create_connection(("127.0.0.1", int(port)), 5)
        except (OSError, ValueError, OverflowError):
            # Its own words, as Go's `http.Error` writes them.
            return self.reply(502, b"Bad Gateway\n", "text/plain; charset=utf-8", X_Content_Type_Options="nosniff")
        backend.settimeout(None)
        upgrade = self.headers.get("Upgrade", "")
        kept = [(name, value) for name, value in self.headers.items() if name.lower() not in DROPPED]
        kept += [("X-Forwarded-For", self.client_address[0]), ("X-Forwarded-Proto", "http")]
        kept += [("Connection", "Upgrade"), ("Upgrade", upgrade)] if upgrade else [("Connection", "close")]
        kept += [(name, self.headers[name]) for name in ("Content-Length", "Transfer-Encoding") if name in self.headers]
        head = [f"{self.command} {quote(unquote(path), safe='/:@!$&()*+,;=~')}{query} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in kept]
        backend.sendall("\r\n".join([*head, "", ""]).encode("latin-1"))
        threading.Thread(target=self.send_on, args=(backend, bool(upgrade)), daemon=True).start()
        with suppress(OSError), backend.makefile("rb") as answer:
            while (head := _head(answer)).startswith(INTERIM):
                self.wfile.write(head)
            # It is closed after this answer. A client that is not told would send its next request into the end.
            closing = b"" if head.startswith(SWITCHING) else b"Connection: close\r\n"
            self.wfile.write(head.removesuffix(b"\r\n") + closing + b"\r\n")
            while data := answer.read1(CHUNK):
                self.wfile.write(data)
        _shut(backend)
        return _shut(self.connection)

    def send_on(self, backend: socket.socket, upgraded: bool) -> None:
        """The body, then what an upgraded connection carries. The client's end ends the backend's connection."""
        chunked = "Transfer-Encoding" in self.headers
        try:
            for data in self.body():
                backend.sendall(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            if chunked:
                backend.sendall(b"0\r\n\r\n")
            while data := self.rfile.read1(CHUNK):
                if upgraded:
                    backend.sendall(data)
        except (OSError, ValueError):
            pass
        _shut(backend)


def _head(answer: io.BufferedIOBase) -> bytes:
    """Of an answer, with its empty line, without what is about the backend's connection unless it has switched."""
    lines: list[bytes] = []
    while (line := answer.readline()) not in (b"\r\n", b"\n"):
        if not line:
            raise ConnectionResetError("the program ended its connection before its answer")
        lines.append(line)
    if not lines[0].startswith(SWITCHING):
        lines = [line for line in lines if line.partition(b":")[0].lower() not in (b"connection", b"keep-alive")]
    return b"".join(lines) + b"\r\n"


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _metrics() -> dict:
    memory = dict(line.split(":", 1) for line in lines_of("/proc/meminfo"))
    total, free = (int(memory[name].split()[0]) / 1024 for name in ("MemTotal", "MemAvailable"))
    shown = {"cpu_count": float(os.cpu_count() or 1), "cpu_used_pct": 0.0, "mem_total_mib": total}
    return shown | {"mem_used_mib": total - free, "timestamp": int(time.time() * 1000)}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients go as they like; any other end of a connection is a fault of this program, which its log tells."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


def main(arguments: list[str]) -> None:
    time.sleep(float(ENV.get("STANDIN_LATE_SECONDS", "0")))
    port = int(arguments[1]) if arguments[:1] == ["-port"] else 44772
    server = Server(("0.0.0.0", port), Agent)
    if arguments[:1] != ["--init"]:
        return server.serve_forever()
    # Process 1: the user's command is a child, and its end is the sandbox's.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        child = subprocess.Popen(arguments[1:], env=ENV)
    except OSError as error:
        sys.exit(f"{arguments[1]}: {error.strerror}" if error.errno != 2 else 127)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    sys.exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    main(sys.argv[1:])
