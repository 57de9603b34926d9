"""From YAML files and `key=value` words to validated settings, with errors that name the file, line and remedy.

A file may name one `base:` (relative to itself) whose values it changes: mappings merge, lists and scalars replace,
and a mapping whose `kind` differs replaces the base's whole.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import pydantic_core
import yaml

from jaxlm.schema import Schema, UserError, did_you_mean

# The parts of a dotted name; list positions are decimal words.
Key = tuple[str, ...]

COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Loaded[T: Schema]:
    """A validated config, where each given value came from, and (name, old, new) of every `key=value` word."""

    config: T
    sources: dict[str, str]
    overridden: list[tuple[str, Any, Any]]


class _Loader(yaml.SafeLoader):
    """YAML whose plain words mean what YAML 1.2 says: `1e-3` is a number; `yes`, `010`, `1:30` and dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?  # 1. 1.5 1.5e3
        |\.\d+(?:[eE][-+]?\d+)?                       # .5
        |\d[\d_]*[eE][-+]?\d+                         # 1e-3
        |\.(?:inf|Inf))$|\.(?:nan|NaN)$""",
        re.VERBOSE | re.ASCII,
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|false|False)$"), list("tTfF"))

# What a settings file is made of; anything else (!!binary, !!set, !mine) is an error.
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {**_Loader.yaml_implicit_resolvers}
# Words that other readers of YAML take for something else are quoted too.
for _first, _resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers[_first] = [*_Dumper.yaml_implicit_resolvers.get(_first, []), *_resolvers]


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = {float("inf"): ".inf", float("-inf"): "-.inf"}.get(value, ".nan" if value != value else repr(value))
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # Line breaks beside \n are escaped: PyYAML folds them when it reads plain or single-quoted text.
    style = '"' if any(c in value for c in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_str)


def load[T: Schema](root: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> Loaded[T]:
    """Read a config.

    Args:
      root: the settings class.
      path: a YAML file; None for none.
      overrides: `a.b=value` words, values in YAML; `a.0.b` reaches into lists.

    Raises:
      UserError: with every problem on a line of its own: `file:line: key: what is wrong; the remedy`.
    """
    problems: list[str] = []
    values, sources = ({}, {}) if path is None else _read_file(Path(path), (), problems)
    overridden = []
    for word in overrides:
        try:
            key, value = _parse_override(word)
            found = _lookup(values, key)
            before = "(default)" if found is _ABSENT else found
            # A copy, because later words may change what lies inside.
            changed = _assign(values, key, copy.deepcopy(value), word)
        except UserError as error:
            problems.append(str(error))
            continue
        overridden.append((".".join(key), before, value))
        sources = {k: place for k, place in sources.items() if k[: len(changed)] != changed}
        sources |= dict.fromkeys((changed, *_keys(value, key)), COMMAND_LINE)
    config = _validate(root, values, sources, "" if path is None else str(path), problems)
    return Loaded(config, {".".join(k): place for k, place in sources.items() if k}, overridden)


def parse_value(annotation: Any, text: str, where: str) -> Any:
    """One value of a settings type from YAML text, e.g. a data source from a command-line option.

    Raises:
      UserError: naming `where`.
    """
    value = _parse_yaml(text, where)
    holder = pydantic.create_model("Holder", __base__=Schema, value=(annotation, ...))
    return _validate(holder, {"value": value}, {("value",): where}, where, drop=1).value


def to_yaml(config: Schema) -> str:
    """The config as YAML in the order of its fields; `load` gives the same config back."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


ABSENT = "(absent)"


def diff(a: Schema, b: Schema) -> list[tuple[str, Any, Any]]:
    """Dotted names of the leaves that differ with both values; `ABSENT` where a config has no such leaf."""
    left, right = dict(_leaves(a.model_dump(mode="json"))), dict(_leaves(b.model_dump(mode="json")))
    names = [*left, *(name for name in right if name not in left)]
    missing = object()

    def filled(name: str, these: dict, those: dict) -> bool:
        # An empty list or mapping that has entries on the other side: those differ, one by one.
        return these.get(name) in ([], {}) and any(other.startswith(f"{name}.") for other in those)

    return [
        (name, left.get(name, ABSENT), right.get(name, ABSENT))
        for name in names
        if left.get(name, missing) != right.get(name, missing)
        and not filled(name, left, right)
        and not filled(name, right, left)
    ]


def format_diff(differences: Sequence[tuple[str, Any, Any]], names: tuple[str, str] = ("before", "after")) -> str:
    """One line a difference."""
    width = max((len(name) for name, *_ in differences), default=0)
    return "\n".join(
        f"  {name:<{width}}  {names[0]}: {_show(before)}  {names[1]}: {_show(after)}"
        for name, before, after in differences
    )


def json_schema(root: type[Schema]) -> dict:
    """JSON schema of a config file, `base` included, for editors."""
    schema = root.model_json_schema()
    base = {"type": "string", "description": "A config that this one changes, relative to this file."}
    schema["properties"] = {"base": base, **schema["properties"]}
    # What a base may hold need not be here, at any depth.
    for section in (schema, *schema.get("$defs", {}).values()):
        section.pop("required", None)
    return schema


def settings_help(root: type[Schema]) -> str:
    """Every setting on two lines: name, type and default, then what it means."""
    lines = []
    for name, kind, default, text in describe_settings(root):
        lines.append(f"{name}: {kind}" + (f" = {default}" if default else ""))
        lines += [f"    {text}"] if text else []
    return "\n".join(lines)


def describe_settings(root: type[Schema], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every setting; members of unions follow with their kind in brackets."""
    for name, field in root.model_fields.items():
        path = f"{prefix}{name}"
        annotation = field.annotation
        default = "(required)" if field.is_required() else _show_default(field)
        yield path, _type_name(annotation), default, field.description or ""
        suffix = {"dict": ".NAME", "tuple": ".0", "list": ".0"}.get(_container(annotation), "")
        for member in _schemas_in(annotation):
            kinds = _kinds(member)
            yield from describe_settings(member, f"{path}{suffix}[{kinds[0]}]." if kinds else f"{path}{suffix}.")


# Reading


def _read_file(
    path: Path, chain: tuple[Path, ...], problems: list[str], named_by: str = ""
) -> tuple[dict, dict[Key, str]]:
    """Values of a file on top of those of its base, and the place of each; `named_by` says where its name stands."""
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(p.name for p in (*chain, resolved))
        raise UserError(f"{named_by}{path}: its `base` leads back to itself: {names}; remove one of them")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f" (there: {', '.join(near)})" if near else ""
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{named_by}{path}: {what}{did_you_mean(path.name, near)}{there}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error

    def where(line: int) -> str:
        return f"{path}:{line}"

    node = _compose(text, where)
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where(1)}: a config is a mapping of settings, got {_kind_of(node)}")
    sources: dict[Key, str] = {}
    values = _construct(node, where, (), sources, problems)
    base = values.pop("base", None)
    if base is None:
        return values, {k: place for k, place in sources.items() if k != ("base",)}
    place = sources[("base",)]
    if not isinstance(base, str):
        raise UserError(f"{place}: base: expected the name of one file, got {_show(base)}")
    base_values, base_sources = _read_file(path.parent / base, (*chain, resolved), problems, f"{place}: base: ")
    values = _merge(base_values, values)
    # Values of the base that were replaced have no place any more.
    merged = {**base_sources, **sources}
    return values, {k: place for k, place in merged.items() if _lookup(values, k) is not _ABSENT}


def _compose(text: str, where: Callable[[int], str]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{where(mark.line + 1)}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where(line)}: not valid YAML: {str(error).splitlines()[0]}") from error


def _construct(
    node: yaml.Node,
    where: Callable[[int], str],
    key: Key,
    sources: dict[Key, str],
    problems: list[str],
    parents: tuple[yaml.Node, ...] = (),
) -> Any:
    """The value of a node; notes the place of everything in it, and problems that do not stop the reading."""
    place = where(node.start_mark.line + 1)
    sources.setdefault(key, place)
    if any(node is parent for parent in parents):
        raise UserError(f"{place}: {'.'.join(key)}: an alias to what it stands in; write the value out")
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{place}: {'.'.join(key)}: the tag {tag} is not read here; write a plain value")
    if isinstance(node, yaml.MappingNode):
        values: dict = {}
        for name_node, value_node in node.value:
            place = where(name_node.start_mark.line + 1)
            if not isinstance(name_node, yaml.ScalarNode):
                raise UserError(f"{place}: a setting's name is a word, got {_kind_of(name_node)}")
            # The text itself, so that an entry named 1e-3 or true keeps its name.
            name = name_node.value
            inner = (*key, name)
            if name == "<<" and name_node.style is None:
                problems.append(f"{place}: {'.'.join(inner)}: YAML merge keys are not read here; use `base`")
            elif name in values:
                problems.append(f"{place}: {'.'.join(inner)}: given twice; keep one")
            else:
                sources[inner] = place
                values[name] = _construct(value_node, where, inner, sources, problems, (*parents, node))
        return values
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(item, where, (*key, str(i)), sources, problems, (*parents, node))
            for i, item in enumerate(node.value)
        ]
    try:
        return _Loader("").construct_object(node)
    except (ValueError, KeyError) as error:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{place}: {'.'.join(key)}: {node.value!r} is no {tag}") from error


def _parse_yaml(text: str, where: str) -> Any:
    def place(line: int) -> str:
        return where

    node = _compose(text, place)
    problems: list[str] = []
    value = None if node is None else _construct(node, place, (), {}, problems)
    if problems:
        raise UserError("\n".join(problems))
    return value


def _parse_override(word: str) -> tuple[Key, Any]:
    name, equals, text = word.partition("=")
    plain = name.lstrip("-")
    if not equals or name != plain or not all(plain.split(".")):
        example = f"{plain or 'train.steps'}={text or '...'}"
        raise UserError(f"{word}: settings are given as key=value, e.g. {example}")
    return tuple(name.split(".")), _parse_yaml(text, f"{COMMAND_LINE}: {name}")


_ABSENT = object()


def _position(items: list, part: str) -> int | None:
    return int(part) if re.fullmatch("[0-9]+", part) and int(part) < len(items) else None


def _lookup(values: Any, key: Key) -> Any:
    for part in key:
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and _position(values, part) is not None:
            values = values[int(part)]
        else:
            return _ABSENT
    return values


def _keys(value: Any, key: Key) -> Iterator[Key]:
    """`key` and those of everything in its value."""
    yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _keys(item, (*key, str(name)))


def _assign(values: dict, key: Key, value: Any, word: str) -> Key:
    """Set the value in place, making the mappings that lead to it; returns the name of the outermost thing replaced."""
    node: Any = values
    for i, part in enumerate(key):
        index: str | int = part
        if isinstance(node, list):
            position = _position(node, part)
            if position is None:
                name = ".".join(key[:i])
                raise UserError(
                    f"{COMMAND_LINE}: {word}: {name} is a list of {len(node)} and has no item {part}; "
                    f"give the list whole: {name}=[...]"
                )
            index = position
        below = key[i + 1 :]
        current = node[index] if isinstance(node, list) else node.get(part)
        if not below or not isinstance(current, (dict, list)):
            for name in reversed(below):
                value = {name: value}
            node[index] = value
            return key[: i + 1]
        node = current
    raise AssertionError("a key has at least one part")


def _merge(base: Any, new: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(new, Mapping)):
        return new
    if "kind" in new and base.get("kind") != new["kind"]:
        return dict(new)
    return {**base, **{name: _merge(base[name], value) if name in base else value for name, value in new.items()}}


# Checking


def _validate[T: Schema](
    root: type[T], values: dict, sources: dict[Key, str], where: str, problems: Sequence[str] = (), drop: int = 0
) -> T:
    found = list(problems)
    try:
        # As JSON, strictly: no number is made of a string or a boolean, yet a list may stand for a tuple.
        config = root.model_validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        found += [_explain(root, problem, sources, where, drop) for problem in error.errors()]
    if found:
        raise UserError("\n".join(sorted(dict.fromkeys(found), key=_natural)))
    return config


def _natural(line: str) -> list[str | int]:
    """Sorts line 9 of a file before its line 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", line))]


def _explain(root: type[Schema], problem: Any, sources: dict[Key, str], where: str, drop: int) -> str:
    key, owner, annotation = _resolve(root, problem["loc"])
    kind, given = problem["type"], problem.get("input")
    context = problem.get("ctx", {})
    if kind == "union_tag_invalid":
        key = (*key, "kind")
    place = next((sources[key[:n]] for n in range(len(key), -1, -1) if key[:n] in sources), where)
    prefix = ": ".join(part for part in (place, ".".join(key[drop:])) if part)
    if kind == "extra_forbidden":
        known = [] if owner is None else list(owner.model_fields)
        guesses = [*known, "base"] if owner is root and not drop else known
        hint = did_you_mean(key[-1], guesses) or f" (known: {', '.join(known)})"
        return f"{prefix}: unknown key{hint}"
    if kind == "missing":
        return f"{prefix}: required but not given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [tag for member in _schemas_in(annotation) for tag in _kinds(member)]
        if kind == "union_tag_not_found":
            return f"{prefix}: needs a `kind`: one of {', '.join(tags)}"
        tag = str(context["tag"])
        return f"{prefix}: unknown kind {tag!r}{did_you_mean(tag, tags)} (known: {', '.join(tags)})"
    if kind == "value_error":
        return f"{prefix}: {context['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    # pydantic speaks of JSON, whose words for these differ from YAML's.
    message = message.replace("a valid array", "a list").replace("an object", "a mapping")
    return f"{prefix}: {message}, got {_show(given)}"


def _resolve(root: type[Schema], location: tuple) -> tuple[Key, type[Schema] | None, Any]:
    """Of a pydantic error's location: the key without union tags, the settings class that holds it, its annotation."""
    key: list[str] = []
    owner: type[Schema] | None = None
    current: Any = root
    for part in location:
        current = _strip(current)
        container = _container(current)
        if typing.get_origin(current) in (typing.Union, types.UnionType):
            # The part says which member of the union was tried; it is no word of the file.
            current = next((member for member in _schemas_in(current) if part in _kinds(member)), current)
            continue
        key.append(str(part))
        owner = current if _is_schema(current) else None
        if owner is not None:
            field = owner.model_fields.get(part)
            current = None if field is None else field.annotation
        elif container:
            current = typing.get_args(current)[1 if container == "dict" else 0]
        else:
            current = None
    return tuple(key), owner, current


def _strip(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Annotated:
        return _strip(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(rest) == 1:
            return _strip(rest[0])
    return annotation


def _is_schema(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Schema)


def _container(annotation: Any) -> str:
    origin = typing.get_origin(_strip(annotation))
    return origin.__name__ if origin in (tuple, list, dict) else ""


def _schemas_in(annotation: Any) -> list[type[Schema]]:
    annotation = _strip(annotation)
    if _is_schema(annotation):
        return [annotation]
    return list(dict.fromkeys(s for a in typing.get_args(annotation) for s in _schemas_in(a)))


def _kinds(schema: type[Schema]) -> tuple[str, ...]:
    """The values of `kind` that stand for a member of a tagged union; none for other settings."""
    field = schema.model_fields.get("kind")
    return () if field is None else typing.get_args(field.annotation)


# Showing


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = None
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = enumerate(value)
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _show(value: Any) -> str:
    if isinstance(value, str) and value == ABSENT:
        return value
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("\n...").strip()


def _show_default(field: pydantic.fields.FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Schema):
        # The kind says which; its settings follow in lines of their own.
        return getattr(value, "kind", "")
    return _show(pydantic_core.to_jsonable_python(value))


def _type_name(annotation: Any) -> str:
    annotation_ = _strip(annotation)
    optional = type(None) in typing.get_args(annotation)
    if typing.get_origin(annotation_) is typing.Literal:
        name = " | ".join(map(str, typing.get_args(annotation_)))
    elif _is_schema(annotation_):
        name = "section"
    elif _container(annotation_):
        inner = typing.get_args(annotation_)[-1 if _container(annotation_) == "dict" else 0]
        name = f"{'mapping' if _container(annotation_) == 'dict' else 'list'} of {_type_name(inner)}"
    elif _schemas_in(annotation_):
        name = "section by kind: " + " | ".join(kind for member in _schemas_in(annotation_) for kind in _kinds(member))
    else:
        name = getattr(annotation_, "__name__", str(annotation_))
    return f"{name} | null" if optional else name


def _kind_of(node: yaml.Node) -> str:
    names = {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}
    return names.get(type(node), repr(node.value))
