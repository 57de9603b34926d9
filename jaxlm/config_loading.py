"""From YAML files and `key=value` words to validated settings, with errors that name the file, line and remedy.

A file may name one `base:` (relative to itself) whose values it changes: mappings merge, lists and scalars replace, and a
mapping whose `kind` differs replaces the base's whole.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jaxlm.schema import Schema, UserError, did_you_mean

Key = tuple[str | int, ...]

COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Loaded[T: Schema]:
    """A validated config, where each value came from, and what `key=value` words changed."""

    config: T
    sources: dict[str, str]
    overridden: list[tuple[str, Any, Any]]


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2: `1e-3` is one, `yes` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?  # 1. 1.5 1.5e3
        |\.\d+(?:[eE][-+]?\d+)?                       # .5
        |\d[\d_]*[eE][-+]?\d+                         # 1e-3
        |\.(?:inf|Inf))$|\.(?:nan|NaN)$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|false|False)$"), list("tTfF"))


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


_Dumper.add_representer(float, _represent_float)


def load[T: Schema](root: type[T], path: str | Path | None, overrides: Sequence[str] = (), defaults: Mapping | None = None) -> Loaded[T]:
    """Read a config.

    Args:
      root: the settings class.
      path: a YAML file; None for none.
      overrides: `a.b=value` words, values in YAML; `a.0.b` reaches into lists.
      defaults: values under those of the file.

    Raises:
      UserError: with every problem on a line of its own: `file:line: key: what is wrong; the remedy`.
    """
    sources: dict[Key, str] = {}
    values = dict(defaults or {})
    if path is not None:
        values = _merge(values, _read_file(Path(path), sources, ()))
    overridden = []
    for word in overrides:
        key, value = _parse_override(word)
        overridden.append((".".join(map(str, key)), _lookup(values, key), value))
        _assign(values, key, value, word)
        sources = {k: v for k, v in sources.items() if k[: len(key)] != key}
        sources[key] = COMMAND_LINE
    config = _validate(root, values, sources, "" if path is None else str(path))
    overridden = [(name, before if before is not _ABSENT else "(default)", value) for name, before, value in overridden]
    return Loaded(config, {".".join(map(str, k)): v for k, v in sources.items()}, overridden)


def parse_value(annotation: Any, text: str, where: str) -> Any:
    """One value of a settings type from YAML text, e.g. a data source from a command-line option.

    Raises:
      UserError: naming `where`.
    """
    value = _parse_yaml(text, where)

    class Holder(Schema):
        value: annotation  # type: ignore[valid-type]

    return _validate(Holder, {"value": value}, {("value",): where}, where, drop=1).value


def to_yaml(config: Schema) -> str:
    """The config as YAML in the order of its fields; `load` gives the same config back."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False
    )


ABSENT = "(absent)"


def diff(a: Schema, b: Schema) -> list[tuple[str, Any, Any]]:
    """Dotted names of the leaves that differ with both values; `ABSENT` where a config has no such leaf."""
    left, right = dict(_leaves(a.model_dump(mode="json"))), dict(_leaves(b.model_dump(mode="json")))
    names = [*left, *(name for name in right if name not in left)]
    missing = object()
    return [
        (name, left.get(name, ABSENT), right.get(name, ABSENT))
        for name in names
        if left.get(name, missing) != right.get(name, missing)
    ]


def format_diff(differences: Sequence[tuple[str, Any, Any]], names: tuple[str, str] = ("before", "after")) -> str:
    """One line a difference."""
    width = max((len(name) for name, *_ in differences), default=0)
    return "\n".join(
        f"  {name:<{width}}  {names[0]}: {_show(before)}  {names[1]}: {_show(after)}" for name, before, after in differences
    )


def json_schema(root: type[Schema]) -> dict:
    """JSON schema of a config file, `base` included, for editors."""
    schema = root.model_json_schema()
    base = {"type": "string", "description": "A config that this one changes, relative to this file."}
    schema["properties"] = {"base": base, **schema["properties"]}
    # What a base may hold need not be here.
    schema.pop("required", None)
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
        members = _schemas_in(annotation)
        yield path, _type_name(annotation), "" if members and default != "(required)" else default, field.description or ""
        suffix = {"dict": ".NAME", "tuple": ".0", "list": ".0"}.get(_container(annotation), "")
        for member in members:
            kind = member.model_fields.get("kind")
            tag = f"[{kind.default}]" if kind is not None else ""
            yield from describe_settings(member, f"{path}{suffix}{tag}.")


# Reading


def _read_file(path: Path, sources: dict[Key, str], chain: tuple[Path, ...]) -> dict:
    resolved = path.resolve()
    if resolved in chain:
        raise UserError(f"{path}: its `base` leads back to itself: {' -> '.join(str(p.name) for p in (*chain, resolved))}")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f" (there: {', '.join(near)})" if near else ""
        raise UserError(f"{path}: no such file{did_you_mean(path.name, near)}{there}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    node = _compose(text, str(path))
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: a config is a mapping of settings, got {_kind_of(node)}")
    own_sources: dict[Key, str] = {}
    values = _construct(node, str(path), (), own_sources)
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{own_sources[('base',)]}: base: expected the name of one file, got {_show(base)}")
        values = _merge(_read_file(path.parent / base, sources, (*chain, resolved)), values)
    sources.update(own_sources)
    return values


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error


def _construct(node: yaml.Node, file: str, key: Key, sources: dict[Key, str]) -> Any:
    place = f"{file}:{node.start_mark.line + 1}"
    sources.setdefault(key, place)
    if isinstance(node, yaml.MappingNode):
        values: dict = {}
        for name_node, value_node in node.value:
            name = _scalar(name_node)
            where = f"{file}:{name_node.start_mark.line + 1}"
            if isinstance(name, (dict, list)) or name is None:
                raise UserError(f"{where}: a setting's name is a word, got {_show(name)}")
            name = str(name)
            if name in values:
                raise UserError(f"{where}: {'.'.join(map(str, (*key, name)))}: given twice; keep one")
            sources[(*key, name)] = where
            values[name] = _construct(value_node, file, (*key, name), sources)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, file, (*key, i), sources) for i, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"line {node.start_mark.line + 1}: cannot read {node.value!r}: {error}") from error


def _parse_yaml(text: str, where: str) -> Any:
    node = _compose(text, where)
    return None if node is None else _construct(node, where, (), {})


def _parse_override(word: str) -> tuple[Key, Any]:
    name, equals, text = word.partition("=")
    plain = name.lstrip("-")
    if not equals or name != plain or not plain or any(not part for part in plain.split(".")):
        raise UserError(f"{word}: settings are given as key=value, e.g. {plain or 'train.steps'}={text or '...'}")
    value = _parse_yaml(text, f"{COMMAND_LINE}: {name}")
    return tuple(int(part) if part.isdigit() else part for part in name.split(".")), value


_ABSENT = object()


def _lookup(values: Any, key: Key) -> Any:
    for part in key:
        if isinstance(values, Mapping) and str(part) in values:
            values = values[str(part)]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            return _ABSENT
    return values


def _assign(values: dict, key: Key, value: Any, word: str) -> None:
    node: Any = values
    for i, part in enumerate(key):
        last = i == len(key) - 1
        if isinstance(node, list):
            if not isinstance(part, int) or part >= len(node):
                name = ".".join(map(str, key[:i]))
                raise UserError(f"{COMMAND_LINE}: {word}: {name} is a list of {len(node)}; its items are 0 to {len(node) - 1}")
        else:
            part = str(part)
        if last:
            node[part] = value
        elif isinstance(node, list) or isinstance(node.get(part), (dict, list)):
            node = node[part]
            if not isinstance(node, (dict, list)):
                raise UserError(f"{COMMAND_LINE}: {word}: {'.'.join(map(str, key[: i + 1]))} has no settings of its own")
        else:
            node[part] = {}
            node = node[part]


def _merge(base: Any, new: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(new, Mapping)):
        return new
    if "kind" in new and base.get("kind") != new["kind"]:
        return dict(new)
    return {**base, **{name: _merge(base[name], value) if name in base else value for name, value in new.items()}}


# Checking


def _validate[T: Schema](root: type[T], values: dict, sources: dict[Key, str], where: str, drop: int = 0) -> T:
    try:
        # As JSON, strictly: no number is made of a string or a boolean, yet a list may stand for a tuple.
        return root.model_validate_json(json.dumps(values, default=str), strict=True)
    except pydantic.ValidationError as error:
        problems = sorted({_explain(root, problem, sources, where, drop) for problem in error.errors()})
        raise UserError("\n".join(problems)) from error


def _explain(root: type[Schema], problem: dict, sources: dict[Key, str], where: str, drop: int) -> str:
    key, owner = _real_key(root, problem["loc"])
    place = next((sources[key[:n]] for n in range(len(key), -1, -1) if key[:n] in sources), where)
    name = ".".join(map(str, key[drop:]))
    prefix = ": ".join(part for part in (place, name) if part)
    kind, given = problem["type"], problem.get("input")
    context = problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = [] if owner is None else list(owner.model_fields)
        hint = did_you_mean(str(key[-1]), known) or (f" (known: {', '.join(known)})" if known else "")
        return f"{prefix}: unknown key{hint}"
    if kind == "missing":
        return f"{prefix}: required but not given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [tag.strip(" '") for tag in context.get("expected_tags", "").split(",")] if context.get("expected_tags") else []
        tags = tags or _tags(root, problem["loc"])
        if kind == "union_tag_not_found":
            return f"{prefix}: needs a `kind`" + (f": one of {', '.join(tags)}" if tags else "")
        tag = context.get("tag", "")
        return f"{prefix}.kind: unknown kind {tag!r}{did_you_mean(str(tag), tags)} (known: {', '.join(tags)})"
    if kind == "value_error":
        return f"{prefix}: {context['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{prefix}: {message}, got {_show(given)}"


def _real_key(root: Any, location: tuple) -> tuple[Key, type[Schema] | None]:
    """A pydantic error's location without the union tags in it, and the settings class that the last part belongs to."""
    key: list[str | int] = []
    owner: Any = root
    current: Any = root
    for part in location:
        current = _strip(current)
        members = _schemas_in(current) if not _is_schema(current) else []
        container = _container(current)
        if members and container == "" and isinstance(part, str) and _member(members, part) is not None:
            current = _member(members, part)
            continue
        key.append(part)
        owner = None
        if _is_schema(current):
            owner = current
            field = current.model_fields.get(part) if isinstance(part, str) else None
            current = field.annotation if field is not None else None
        elif len(members) == 1 and container == "":
            owner = members[0]
            field = members[0].model_fields.get(part) if isinstance(part, str) else None
            current = field.annotation if field is not None else None
        elif container in ("tuple", "list"):
            current = typing.get_args(current)[0]
        elif container == "dict":
            current = typing.get_args(current)[1]
        else:
            current = None
    return tuple(key), owner


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


def _member(members: Sequence[type[Schema]], tag: str) -> type[Schema] | None:
    for member in members:
        kind = member.model_fields.get("kind")
        if kind is not None and kind.default == tag:
            return member
    return None


def _tags(root: Any, location: tuple) -> list[str]:
    current: Any = root
    for part in location:
        current = _strip(current)
        if _is_schema(current) and part in current.model_fields:
            current = current.model_fields[part].annotation
        elif _container(current):
            current = typing.get_args(current)[1 if _container(current) == "dict" else 0]
    return [m.model_fields["kind"].default for m in _schemas_in(current) if "kind" in m.model_fields]


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
        return ""
    return _show(list(value) if isinstance(value, tuple) else value)


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
        name = "section by kind: " + " | ".join(str(m.model_fields["kind"].default) for m in _schemas_in(annotation_))
    else:
        name = getattr(annotation_, "__name__", str(annotation_))
    return f"{name} | null" if optional else name


def _kind_of(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"
