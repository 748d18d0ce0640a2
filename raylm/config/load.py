"""One loader for YAML files, dotted overrides and SDK mappings."""

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from raylm.config.base import Section
from raylm.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)
Overrides = Sequence[str] | Mapping[str, Any]


def load_config(
    kind: type[SectionT], source: str | Path | Mapping[str, Any] | SectionT, overrides: Overrides = ()
) -> SectionT:
    """Reads a YAML file or a mapping, applies overrides, and validates the whole tree.

    overrides: `["a.b=value", …]` as on a command line (values are YAML) or `{"a.b": value}`.
    Raises ConfigError naming the file, the key and, for an unknown key, the nearest known one.
    """
    if isinstance(source, kind):
        where, tree = kind.__name__, source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        where, tree = kind.__name__, _plain(source)
    else:
        where, tree = str(source), read_yaml(Path(str(source)))
    for key, value in _parse_overrides(overrides):
        _set(tree, key, value)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(where, _describe(error, kind, tree), "") from None


def dump_yaml(config: Section) -> str:
    """The resolved tree as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as it stands, not validated. Raises ConfigError with the line of a fault."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(str(path), "there is no such file.", "Give the path of a YAML configuration.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}.") from None
    try:
        tree = yaml.load(text, Loader=UniqueKeyLoader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}", f"not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"not valid YAML: {error}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(str(path), "a configuration is a mapping of sections, such as `model: {path: …}`.")
    return tree


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    """A mutable copy in which mappings are dicts, keys with dots open sections, and sections are dumped."""
    tree: dict[str, Any] = {}
    for key, value in source.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        _set(tree, str(key), _plain(value) if isinstance(value, Mapping) and "." not in str(key) else value)
    return tree


def _parse_overrides(overrides: Overrides) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r}", "is not of the form section.key=value.")
        try:
            is_comment = text.lstrip().startswith("#")  # to YAML; on a command line nobody means one
            pairs.append((key, text if is_comment else yaml.safe_load(text) if text else None))
        except yaml.YAMLError:
            pairs.append((key, text))
    return pairs


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        child = tree.get(name)
        if child is None:
            child = tree[name] = {}
        elif not isinstance(child, dict):
            raise ConfigError(f"override {dotted}", f"{name} holds a value, not a section.")
        tree = child
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        tree[last] = {**tree[last], **value}
    else:
        tree[last] = value


def check_key(kind: type[Section], dotted: str, where: str) -> None:
    """Raises ConfigError, which says that it stands at `where`, for a key that the tree has not."""
    section: type[BaseModel] | None = kind
    parts = dotted.split(".")
    for place, name in enumerate(parts):
        if section is None:
            return  # within a value, which knows its own keys
        if name not in section.model_fields:
            raise ConfigError(
                where, f"unknown key {'.'.join(parts[: place + 1])}.", _nearest(parts[: place + 1], kind).strip()
            )
        section = _section_type(section.model_fields[name].annotation)


def check_value(kind: type[Section], dotted: str, value: Any, where: str) -> None:
    """Raises ConfigError, which says that it stands at `where`, for a value that this key of the tree can never have,
    whatever the others are."""
    *parents, last = dotted.split(".")
    section: type[BaseModel] | None = kind
    for name in parents:
        section = _section_type(section.model_fields[name].annotation) if section else None
    if section is None:
        return  # within a value, which knows its own keys
    field = section.model_fields[last]
    annotation: Any = typing.Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        words = dict.fromkeys(_in_words(fault, None) for fault in error.errors())
        raise ConfigError(where, f"{dotted} is never {value!r}: {', or '.join(words)}.", "Correct it.") from None


def _describe(error: ValidationError, kind: type[Section], tree: Mapping[str, Any]) -> str:
    faults: dict[str, list[str]] = {}  # what is wrong, and what each of several kinds of value would have to be
    # A list that lost its faulty members may then be called too short, which is no fault of its own.
    errors = [e for e in error.errors() if e["type"] != "too_short" or len(error.errors()) == 1]
    for fault in errors:
        place, section = _place(fault["loc"], kind, tree)
        key = ".".join(str(part) for part in place)
        if fault["type"] == "extra_forbidden":
            faults[f"unknown key {key}.{_nearest([part for part in place if isinstance(part, str)], kind)}"] = []
        elif fault["type"] == "missing":
            faults[f"{key} is missing. Set it in the file or as {key}=…"] = []
        elif fault["type"] == "value_error":
            message = str(fault["ctx"]["error"]) if "ctx" in fault else fault["msg"]
            faults[f"{key}: {message}." if key else f"{message}."] = []
        else:
            faults.setdefault(f"{key}={fault['input']!r} is not valid: ", []).append(_in_words(fault, section))
    return " ".join(f"{head}{', or '.join(dict.fromkeys(tails))}." if tails else head for head, tails in faults.items())


def _place(
    loc: Sequence[str | int], kind: type[BaseModel], tree: Any
) -> tuple[list[str | int], type[BaseModel] | None]:
    """Where a fault lies in the words of the user, and the section there, if it is one: without a number in what they
    wrote as one value and no list, and without the name of a kind of value."""
    found: list[str | int] = []
    section: type[BaseModel] | None = kind
    for part in loc:
        if isinstance(part, int):
            if isinstance(tree, list | tuple):
                found.append(part)
                tree = tree[part] if part < len(tree) else None
            continue
        field = section.model_fields.get(part) if section else None
        if field or isinstance(tree, Mapping) or tree is None:
            found.append(part)
            tree = _inside(tree, part) if isinstance(tree, Mapping) else None
        section = _section_type(field.annotation) if field else section
    return found, section


def _inside(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a key that may stand as sections within sections."""
    if key in tree:
        return tree[key]
    head, dot, rest = key.partition(".")
    inner = tree.get(head)
    return _inside(inner, rest) if dot and isinstance(inner, Mapping) else None


def _in_words(fault: Any, section: type[BaseModel] | None) -> str:
    """What a value should be, in words for who wrote a file. section: that it should be."""
    kinds = {
        "model_type": f"a section is needed, with keys {', '.join(section.model_fields) if section else ''}",
        "dict_type": "a mapping is needed",
        "tuple_type": "a list is needed",
        "list_type": "a list is needed",
        "too_short": "there are too few entries",
        "too_long": "there are too many entries",
    }
    text = kinds.get(fault["type"], fault["msg"])
    return f"{text[0].lower()}{text[1:]}"


def _nearest(path: Sequence[str], kind: type[BaseModel]) -> str:
    """Advice for an unknown key: the likeliest known one, of the same section or of any."""
    section: type[BaseModel] | None = kind
    is_free = False
    for name in path[:-1]:
        if is_free:  # a key of a mapping of sections, which has any name
            is_free = False
            continue
        field = section.model_fields.get(name) if section else None
        section = _section_type(field.annotation) if field else None
        is_free = field is not None and _is_mapping(field.annotation)
    known = list(section.model_fields) if section else []
    prefix = ".".join(path[:-1])
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    everywhere = {key.rsplit(".", 1)[-1]: key for key in _all_keys(kind)}
    near = difflib.get_close_matches(path[-1], list(everywhere), n=1, cutoff=0.8)
    if near:
        return f" Did you mean {everywhere[near[0]]}?"
    return f" Known keys: {', '.join(known)}." if known else ""


def _all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        section = _section_type(field.annotation)
        keys += _all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, by itself, as an option, or as the members of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _section_type(inner))), None)


def _is_mapping(annotation: Any) -> bool:
    """Whether a field's type is a mapping, whatever it is annotated with."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_mapping(typing.get_args(annotation)[0])
    return isinstance(origin, type) and issubclass(origin, Mapping)
