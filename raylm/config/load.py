"""One loader for YAML files, dotted overrides and SDK mappings."""

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

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
        raise ConfigError(where, _describe(error, kind), "") from None


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


def _describe(error: ValidationError, kind: type[Section]) -> str:
    faults = []
    # A list that lost its faulty members may then be called too short, which is no fault of its own.
    errors = [e for e in error.errors() if e["type"] != "too_short" or len(error.errors()) == 1]
    for fault in errors:
        path = [part for part in fault["loc"] if isinstance(part, str)]
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown key {key}.{_nearest(path, kind)}")
        elif fault["type"] == "missing":
            faults.append(f"{key} is missing. Set it in the file or as {key}=…")
        elif fault["type"] == "value_error":
            message = str(fault["ctx"]["error"]) if "ctx" in fault else fault["msg"]
            faults.append(f"{key}: {message}." if key else f"{message}.")
        else:
            faults.append(f"{key}={fault['input']!r} is not valid: {fault['msg'][0].lower()}{fault['msg'][1:]}.")
    return " ".join(dict.fromkeys(faults))


def _nearest(path: Sequence[str], kind: type[BaseModel]) -> str:
    """Advice for an unknown key: the likeliest known one, of the same section or of any."""
    section: type[BaseModel] | None = kind
    for name in path[:-1]:
        section = (
            _section_type(section.model_fields[name].annotation) if section and name in section.model_fields else None
        )
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
