"""The two things every room shares with the user: settings that refuse unknown keys, and errors worth reading."""

import difflib
from collections.abc import Iterable

import pydantic


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
