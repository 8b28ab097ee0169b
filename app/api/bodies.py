"""Request bodies: bytes to the handler's type, strictly and in one pass.

`StrictBody` is the DTO of every handler with a `data` parameter. Litestar's own decoding converts after decoding, and
takes the string "null" for null, which would change the value of an environment variable.

msgspec checks types and bounds; here is what it does not know: UTF-8 in parts that are skipped, and U+0000, which JSON
can express and PostgreSQL cannot store. Nesting beyond the recursion limit is refused where it is met. Top-level names
are also taken in snake_case, as the public server does; when both are there, camelCase wins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, cast

import msgspec
from litestar.dto import MsgspecDTO
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition
from msgspec import Raw, Struct

from app.api.errors import from_msgspec, wrong

_NUL = b"\\u0000"


class StrictBody(MsgspecDTO[Struct]):
    """For any type that msgspec decodes."""

    _decoders: ClassVar[dict[str, Callable[[bytes], Any]]] = {}

    @classmethod
    def create_for_field_definition(
        cls,
        field_definition: FieldDefinition,
        handler_id: str,
        backend_cls: Any = None,  # noqa: ARG003 - theirs
    ) -> None:
        """Litestar's hook at registration."""
        if field_definition.name == "data":
            cls._decoders[handler_id] = decoder(field_definition.annotation)

    def decode_bytes(self, value: bytes) -> Any:
        """Litestar's hook for each request."""
        return self._decoders[cast("Any", self).asgi_connection.route_handler.handler_id](value)

    @classmethod
    def create_openapi_schema(
        cls,
        field_definition: FieldDefinition,
        handler_id: str,  # noqa: ARG003 - theirs
        schema_creator: Any,
    ) -> Reference | Schema:
        """The type's own schema, since nothing is added to it or left out."""
        return schema_creator.for_field_definition(FieldDefinition.from_annotation(field_definition.annotation))


@lru_cache
def decoder(kind: Any) -> Callable[[bytes], Any]:
    """Decodes bodies of one type, or raises `Problem` 422 with the place and the rule."""
    decode = msgspec.json.Decoder(kind).decode
    aliases = _aliases(kind)

    def decoded(raw: bytes) -> Any:
        try:
            raw.decode()
            _refuse_nul(raw)
            return decode(_camel(raw, aliases))
        except msgspec.ValidationError as error:
            raise from_msgspec(error) from None
        except UnicodeDecodeError:
            raise wrong("body", rule="must be UTF-8", kind="json_invalid") from None
        except msgspec.DecodeError as error:
            # Its words name what is wrong and at which byte, never what stands there.
            raise wrong("body", rule=f"must be JSON: {error}", kind="json_invalid") from None
        except RecursionError:
            raise wrong("body", rule="is nested too deeply", kind="json_invalid") from None

    return decoded


def _camel(raw: bytes, aliases: dict[str, str]) -> bytes:
    """Rename top-level snake_case keys. Costs a second pass only when there is one."""
    if not any(name.encode() in raw for name in aliases):
        return raw
    top = msgspec.json.decode(raw, type=dict[str, Raw])
    renamed = {aliases[name]: value for name, value in top.items() if name in aliases}
    return msgspec.json.encode(renamed | {name: top[name] for name in top.keys() - aliases.keys()})


def _aliases(kind: Any) -> dict[str, str]:
    if not hasattr(kind, "__struct_fields__"):
        return {}
    return {field.name: field.encode_name for field in msgspec.structs.fields(kind) if field.name != field.encode_name}


def _refuse_nul(raw: bytes) -> None:
    # The escape may itself be escaped (a backslash, then "u0000"), so only the decoded text decides.
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
