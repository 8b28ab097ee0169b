"""A stand-in for the agent of a sandbox (OpenSandbox's execd), for tests. One file, standard library only.

It answers on the paths that the public SDKs use: `/ping`, `/command` (the stream of events that they read), `/files`,
`/directories`, `/metrics`, and `/proxy/<port>/...` to programs inside the sandbox. With EXECD_ACCESS_TOKEN set, every
path wants it in the header X-EXECD-ACCESS-TOKEN. What it does not have is 404.

Faults, by environment: STANDIN_SILENT (accepts, never answers), STANDIN_TOKEN (wants this token instead),
STANDIN_LATE_SECONDS, STANDIN_DIES_AFTER (so many requests), STANDIN_OTHER (some other service that has the port).
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

sys.modules["ssl"] = None  # type: ignore[assignment] - not needed, and it would bring large libraries
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # noqa: E402
from urllib.parse import parse_qs, quote, unquote  # noqa: E402

for _name in ("PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(_name, None)  # they are about this interpreter, not about the user's

ENV = dict(os.environ)
TOKEN = ENV.get("STANDIN_TOKEN") or ENV.get("EXECD_ACCESS_TOKEN", "")
SILENT, OTHER, DIES_AFTER = "STANDIN_SILENT" in ENV, "STANDIN_OTHER" in ENV, int(ENV.get("STANDIN_DIES_AFTER", "0"))
CHUNK = 1 << 16
PER_CONNECTION = {"connection", "upgrade", "keep-alive", "te", "transfer-encoding", "content-length"}
DROPPED = PER_CONNECTION | {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}
REQUESTS = itertools.count(1)
COMMANDS: dict[str, Command] = {}


class Command:
    """One command, its output and its end."""

    def __init__(self, request: dict) -> None:
        self.id = os.urandom(16).hex()
        self.started = time.time()
        self.finished: float | None = None
        self.output: list[str] = []
        words = request.get("argv") or ["/bin/sh", "-c", request["command"]]
        ids = {name: request[key] for name, key in (("user", "uid"), ("group", "gid")) if key in request}
        env = ENV | _env_file() | request.get("envs", {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            words, cwd=request.get("cwd"), env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            start_new_session=True, **ids,
        )  # fmt: skip
        COMMANDS[self.id] = self
        if request.get("timeout"):
            threading.Timer(request["timeout"] / 1000, self.kill).start()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def read(self, name: str, say) -> None:
        for line in getattr(self.process, name):
            self.output.append(line.decode(errors="replace"))
            say(type=name, text=self.output[-1].removesuffix("\n"))

    def run(self, say) -> None:
        """Both streams by lines, then the end."""
        errors = threading.Thread(target=self.read, args=("stderr", say), daemon=True)
        errors.start()
        self.read("stdout", say)
        errors.join()
        code = self.process.wait()
        self.finished = time.time()
        if code:
            code = 128 - code if code < 0 else code
            say(type="error", error={"ename": "CommandExecError", "evalue": str(code), "traceback": []})
        else:
            say(type="execution_complete", execution_time=int((self.finished - self.started) * 1000))


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
        try:
            if (handler := getattr(self, name, None)) is not None:
                return handler()
            if path.startswith("/command/"):
                return self.about_command(path.split("/")[2:])
            return self.refuse(404, "NOT_FOUND", f"the stand-in has no {self.command} {path}")
        except FileNotFoundError as error:
            return self.refuse(404, "FILE_NOT_FOUND", str(error))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return self.refuse(400 if isinstance(error, (ValueError, KeyError)) else 500, "FAILED", repr(error))

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

    def refuse(self, status: int, code: str, message: str) -> None:
        self.close_connection = True  # the body may not have been read
        self.reply(status, json.dumps({"code": code, "message": message}).encode(), Connection="close")

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
        memory = dict(line.split(":", 1) for line in _lines("/proc/meminfo"))
        total, free = (int(memory[name].split()[0]) / 1024 for name in ("MemTotal", "MemAvailable"))
        shown = {"cpu_count": float(os.cpu_count() or 1), "cpu_used_pct": 0.0, "mem_total_mib": total}
        shown |= {"mem_used_mib": total - free, "timestamp": int(time.time() * 1000)}
        self.reply(200, json.dumps(shown).encode())

    def post_command(self) -> None:
        request = self.document()
        command, lock = Command(request), threading.Lock()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def say(**event: object) -> None:
            data = json.dumps({**event, "timestamp": int(time.time() * 1000)}).encode() + b"\n\n"
            with lock:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        say(type="init", text=command.id)
        if request.get("background"):
            threading.Thread(target=command.run, args=(lambda **_: None,), daemon=True).start()
            say(type="execution_complete", execution_time=0)
        else:
            try:
                command.run(say)
            except OSError:
                command.kill()  # nobody reads any more
                raise
        self.wfile.write(b"0\r\n\r\n")

    def delete_command(self) -> None:
        command = COMMANDS[self.query["id"][0]]
        command.kill()
        self.reply(200)

    def about_command(self, rest: list[str]) -> None:
        command = COMMANDS.get(rest[-1] if rest[0] == "status" else rest[0])
        if command is None:
            return self.refuse(404, "NOT_FOUND", "no such command")
        if rest[-1] == "logs":
            lines = command.output[int(self.query.get("cursor", ["0"])[0]) :]
            cursor = str(len(command.output))
            return self.reply(200, "".join(lines).encode(), "text/plain", EXECD_COMMANDS_TAIL_CURSOR=cursor)
        shown = {"id": command.id, "running": command.finished is None, "started_at": _instant(command.started)}
        if command.finished is not None:
            shown |= {"exit_code": command.process.returncode, "finished_at": _instant(command.finished)}
        return self.reply(200, json.dumps(shown).encode())

    def post_files_upload(self) -> None:
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        metadata: dict = {}
        for part in (b"\r\n" + b"".join(self.body())).split(b"\r\n" + boundary)[1:-1]:
            head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
            if b'name="metadata"' in head:
                metadata = json.loads(content)
                continue
            os.makedirs(os.path.dirname(metadata["path"]) or "/", exist_ok=True)
            with open(metadata["path"], "wb") as file:
                file.write(content)
            os.chmod(metadata["path"], int(str(metadata.get("mode") or 644), 8))
        self.reply(200)

    def get_files_download(self) -> None:
        with open(self.query["path"][0], "rb") as file:
            content = file.read()
        if "offset" in self.query or "limit" in self.query:
            first = int(self.query.get("offset", ["1"])[0]) - 1
            count = int(self.query["limit"][0]) if "limit" in self.query else None
            content = b"".join(content.splitlines(keepends=True)[first:][:count])
        kind, size = "application/octet-stream", len(content)
        asked = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not asked[1]:
            return self.reply(200, content, kind)
        first = int(asked[0]) if asked[0] else size - int(asked[2])
        last = min(size - 1, int(asked[2])) if asked[0] and asked[2] else size - 1
        return self.reply(206, content[first : last + 1], kind, Content_Range=f"bytes {first}-{last}/{size}")

    def get_files_info(self) -> None:
        self.reply(200, json.dumps({path: _info(path) for path in self.query["path"]}).encode())

    def delete_files(self) -> None:
        for path in self.query["path"]:
            os.unlink(path)
        self.reply(200)

    def post_directories(self) -> None:
        for path, options in self.document().items():
            os.makedirs(path, exist_ok=True)
            os.chmod(path, int(str(options.get("mode") or 755), 8))
        self.reply(200)

    def delete_directories(self) -> None:
        for path in self.query["path"]:
            shutil.rmtree(path)
        self.reply(200)

    # to a program in the sandbox

    def proxy(self, port: str, path: str, query: str) -> None:
        self.close_connection = True
        try:
            backend = socket.create_connection(("127.0.0.1", int(port)), 5)
        except (OSError, ValueError, OverflowError) as error:
            return self.refuse(502, "BAD_GATEWAY", f"port {port}: {error}")
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
        try:
            while data := backend.recv(CHUNK):
                self.wfile.write(data)
        except OSError:
            pass
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


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _instant(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _info(path: str) -> dict:
    shown = os.lstat(path)
    at = _instant(shown.st_mtime)
    kind = "directory" if os.path.isdir(path) else "file"
    named = {"owner": _named("/etc/passwd", shown.st_uid), "group": _named("/etc/group", shown.st_gid)}
    mode = int(f"{shown.st_mode & 0o7777:o}")
    return {
        "path": path,
        "size": shown.st_size,
        "modified_at": at,
        "created_at": at,
        "mode": mode,
        "type": kind,
    } | named


def _named(table: str, number: int) -> str:
    rows = [line.split(":") for line in _lines(table)]
    return next((row[0] for row in rows if row[2:] and row[2].strip() == str(number)), str(number))


def _env_file() -> dict[str, str]:
    path = ENV.get("EXECD_ENVS", "/opt/opensandbox/.env")
    rows = (line.removeprefix("export ").partition("=") for line in _lines(path))
    return {name: "".join(shlex.split(value)) for name, is_row, value in rows if is_row}


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        pass  # clients go as they like


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
