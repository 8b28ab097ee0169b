"""Request bodies: bytes to structs, strictly and in one pass.

msgspec checks types and bounds; here is what it does not know: the content type, UTF-8 in parts that are skipped, and
U+0000, which JSON can say and PostgreSQL cannot store. Nesting beyond the recursion limit is refused where it is met.
Top-level names are also taken in snake_case, as the public server does; when both are there, camelCase wins.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

import msgspec
from msgspec import Raw

from app.api.call import Call
from app.api.errors import Problem, from_msgspec, wrong

T = TypeVar("T")
_NUL = b"\\u0000"


class Body(Generic[T]):
    """A decoder of one type."""

    def __init__(self, type_: type[T]) -> None:
        """For a struct or a dict."""
        self.type: type[T] = type_
        self._decode = msgspec.json.Decoder(type_).decode
        self._aliases = _aliases(type_)

    async def of(self, call: Call) -> T:
        """Read and decode.

        Raises:
            Problem: 415, 413, or 422 with the place and the rule.
        """
        if not _says_json(call.headers.get("content-type", "")):
            raise Problem(
                415, "GENERAL::UNSUPPORTED_MEDIA_TYPE", "The body must come as Content-Type: application/json."
            )
        raw = await call.body()
        if not raw:
            raise wrong("body", rule="is required", kind="missing")
        try:
            raw.decode()
            _refuse_nul(raw)
            return self._decode(self._camel(raw))
        except msgspec.ValidationError as error:
            raise from_msgspec(error) from None
        except UnicodeDecodeError:
            raise wrong("body", rule="must be UTF-8", kind="json_invalid") from None
        except msgspec.DecodeError as error:
            # Its words name what is wrong and at which byte, never what stands there.
            raise wrong("body", rule=f"must be JSON: {error}", kind="json_invalid") from None
        except RecursionError:
            raise wrong("body", rule="is nested too deeply", kind="json_invalid") from None

    def _camel(self, raw: bytes) -> bytes:
        """Rename top-level snake_case keys. Costs a second pass only when there is one."""
        if not any(name.encode() in raw for name in self._aliases):
            return raw
        top = msgspec.json.decode(raw, type=dict[str, Raw])
        renamed = {self._aliases[name]: value for name, value in top.items() if name in self._aliases}
        return msgspec.json.encode(renamed | {name: top[name] for name in top.keys() - self._aliases.keys()})


def _aliases(type_: Any) -> dict[str, str]:
    if not hasattr(type_, "__struct_fields__"):
        return {}
    return {field.name: field.encode_name for field in msgspec.structs.fields(type_) if field.name != field.encode_name}


def _says_json(content_type: str) -> bool:
    essence = content_type.partition(";")[0].strip().lower()
    return essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json"))


def _refuse_nul(raw: bytes) -> None:
    # The escape may itself be escaped (a backslash, then "u0000"), so only a decoded look decides.
    if _NUL in raw and _has_nul(msgspec.json.decode(raw)):
        raise wrong("body", rule="no string may contain U+0000")


def _has_nul(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\0" in item:
                return True
        elif isinstance(item, dict):
            pending += cast("dict[str, Any]", item)
            pending += cast("dict[str, Any]", item).values()
        elif isinstance(item, list):
            pending += cast("list[Any]", item)
    return False
