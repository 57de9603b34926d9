"""The two things every room shares with the user: settings that refuse unknown keys, and errors worth reading."""

import difflib
import typing
from collections.abc import Iterable
from typing import Any

import pydantic
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Schema(pydantic.BaseModel):
    """Base of every settings class: immutable, and an unknown key is an error instead of a silent default."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    def __hash__(self) -> int:
        # Settings are static attributes of modules, so jax hashes them; pydantic's own hash fails on dict fields.
        return hash((type(self), self.model_dump_json()))


class UserError(Exception):
    """Bad input. The message names the field or file at fault and the remedy; the command line prints it, no traceback."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class KnownKind:
    """Annotation of a union of settings by `kind`: in Python, too, an unknown kind is answered with the nearest one.

    Config files are read as JSON, where `config_loading` words the error with its line; a validator there would take the
    strict reading of JSON, in which a list may stand for a tuple, from the settings below.
    """

    def __get_pydantic_core_schema__(self, union: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        kinds = [kind for member in typing.get_args(union) for kind in typing.get_args(member.model_fields["kind"].annotation)]
        plain = handler(union)

        def known(value: Any) -> Any:
            if isinstance(value, dict) and value.get("kind", kinds[0]) not in kinds:
                tag = str(value["kind"])
                message = f"unknown kind {tag!r}{did_you_mean(tag, kinds)} (known: {', '.join(kinds)})"
                raise PydanticCustomError("union_tag_invalid", "{message}", {"message": message, "tag": tag})
            return value

        python = core_schema.no_info_before_validator_function(known, plain)
        return core_schema.json_or_python_schema(json_schema=plain, python_schema=python)
