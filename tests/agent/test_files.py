"""Files and folders through the agent, as the public SDK asks for them. The stand-in is held to the real one."""

from __future__ import annotations

import io

import aiohttp
import pytest
from opensandbox.adapters.filesystem_adapter import FilesystemAdapter
from opensandbox.config import ConnectionConfig
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.filesystem import (
    ContentReplaceEntry,
    DirectoryListEntry,
    MoveEntry,
    SearchEntry,
    SetPermissionEntry,
    WriteEntry,
)
from opensandbox.models.sandboxes import SandboxEndpoint

pytestmark = pytest.mark.engine


@pytest.fixture
def files(endpoint: tuple[ConnectionConfig, SandboxEndpoint]) -> FilesystemAdapter:
    return FilesystemAdapter(*endpoint)


@pytest.mark.parametrize("proxied", [False, True], ids=["chunked", "with-length"])
async def test_write_and_read(endpoint: tuple[ConnectionConfig, SandboxEndpoint], proxied: bool):
    config, place = endpoint
    files = FilesystemAdapter(config.model_copy(update={"use_server_proxy": proxied}), place)
    content = bytes(range(256)) * 1000
    await files.write_files(
        [
            WriteEntry(path="/tmp/deep/a.bin", data=content, mode=640),
            WriteEntry(path="/tmp/b", data="ü\n"),
            WriteEntry(path="/tmp/c", data=io.BytesIO(content)),
        ]
    )
    assert await files.read_bytes("/tmp/deep/a.bin") == content
    assert await files.read_file("/tmp/b") == "ü\n"
    streamed = [chunk async for chunk in await files.read_bytes_stream("/tmp/c", chunk_size=1000)]
    assert b"".join(streamed) == content
    assert len(streamed) == len(content) // 1000
    info = (await files.get_file_info(["/tmp/deep/a.bin"]))["/tmp/deep/a.bin"]
    assert (info.size, info.mode, info.owner, info.entry_type) == (len(content), 640, "root", "file")
    await files.delete_files(["/tmp/b"])
    with pytest.raises(SandboxApiException) as caught:
        await files.get_file_info(["/tmp/b"])
    assert caught.value.status_code == 404


async def test_parts_of_a_file(files: FilesystemAdapter):
    await files.write_file("/tmp/lines", "".join(f"{n}\n" for n in range(1, 10)))
    assert await files.read_file("/tmp/lines", offset=3, limit=2) == "3\n4\n"
    assert await files.read_bytes("/tmp/lines", range_header="bytes=2-5") == b"2\n3\n"
    assert await files.read_bytes("/tmp/lines", range_header="bytes=14-") == b"8\n9\n"
    assert await files.read_bytes("/tmp/lines", range_header="bytes=-4") == b"8\n9\n"


async def test_move_replace_and_permissions(files: FilesystemAdapter):
    await files.write_file("/tmp/from/a", "one two two")
    await files.move_files([MoveEntry(source="/tmp/from/a", destination="/tmp/to/b")])
    assert (await files.get_file_info(["/tmp/to/b"])).keys() == {"/tmp/to/b"}
    with pytest.raises(SandboxApiException) as gone:
        await files.get_file_info(["/tmp/from/a"])
    assert gone.value.status_code == 404
    (counted,) = await files.replace_contents_detailed(
        [ContentReplaceEntry(path="/tmp/to/b", old_content="two", new_content="2")]
    )
    assert counted.replaced_count == 2
    await files.replace_contents([ContentReplaceEntry(path="/tmp/to/b", old_content="one", new_content="1")])
    assert await files.read_file("/tmp/to/b") == "1 2 2"
    await files.set_permissions([SetPermissionEntry(path="/tmp/to/b", mode=600)])
    assert (await files.get_file_info(["/tmp/to/b"]))["/tmp/to/b"].mode == 600
    with pytest.raises(SandboxApiException) as absent:
        await files.move_files([MoveEntry(source="/tmp/absent", destination="/tmp/x")])
    assert absent.value.status_code == 404


async def test_folders(files: FilesystemAdapter):
    await files.create_directories([WriteEntry(path="/tmp/tree/sub", mode=700)])
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md"):
        await files.write_file(f"/tmp/tree/{name}", name)
    made = (await files.get_file_info(["/tmp/tree/sub"]))["/tmp/tree/sub"]
    assert (made.mode, made.entry_type) == (700, "directory")
    listed = await files.list_directory(DirectoryListEntry(path="/tmp/tree"))
    assert [each.path for each in listed] == [f"/tmp/tree/{name}" for name in ("a.txt", "b.txt", "sub")]
    deep = await files.list_directory(DirectoryListEntry(path="/tmp/tree", depth=2))
    assert [each.path for each in deep][-2:] == ["/tmp/tree/sub/c.txt", "/tmp/tree/sub/d.md"]
    found = await files.search(SearchEntry(path="/tmp/tree", pattern="*.txt"))
    assert {each.path for each in found} == {f"/tmp/tree/{name}" for name in ("a.txt", "b.txt", "sub/c.txt")}
    await files.delete_directories(["/tmp/tree"])
    for call in (
        files.list_directory(DirectoryListEntry(path="/tmp/tree")),
        files.search(SearchEntry(path="/tmp/tree", pattern="*")),
    ):
        with pytest.raises(SandboxApiException) as caught:
            await call
        assert caught.value.status_code == 404


async def test_what_is_absent_can_be_deleted(files: FilesystemAdapter):
    await files.delete_files(["/tmp/absent"])
    await files.delete_directories(["/tmp/absent"])


async def test_a_folder_is_no_file(files: FilesystemAdapter):
    await files.create_directories([WriteEntry(path="/tmp/folder")])
    with pytest.raises(SandboxApiException) as caught:
        await files.delete_files(["/tmp/folder"])
    assert caught.value.status_code == 500


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/files/download", None, 400),
        ("GET", "/files/search", None, 400),
        ("GET", "/files/download?path=/absent", None, 404),
        ("POST", "/files/mv", b"{", 400),
        ("POST", "/files/permissions", b"no JSON", 400),
        ("POST", "/command", b"", 400),
        ("POST", "/command", b"{}", 400),
        ("GET", "/command/status/absent", None, 404),
        ("GET", "/command/absent/logs", None, 404),
        ("DELETE", "/session/absent", None, 404),
    ],
)
async def test_bad_requests(session: aiohttp.ClientSession, method: str, path: str, body: bytes | None, status: int):
    async with session.request(method, path, data=body) as answer:
        assert answer.status == status
        assert (await answer.json()).keys() == {"code", "message"}


async def test_a_range_beyond_the_end(session: aiohttp.ClientSession, files: FilesystemAdapter):
    await files.write_file("/tmp/short", "12")
    async with session.get("/files/download?path=/tmp/short", headers={"Range": "bytes=9-x"}) as answer:
        assert answer.status == 416
