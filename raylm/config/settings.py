"""A configuration as a flat list of settings, and those that were chosen: what reports and trackers show."""

from typing import Any

from raylm.config.base import Section


def flat_settings(config: Section) -> dict[str, Any]:
    """Dotted key -> value as JSON has it; lists, mappings and sections that are not set are one value."""
    return {key: value for key, value, _ in _walk(config, "")}


def changed_settings(config: Section) -> dict[str, Any]:
    """The settings of `flat_settings` that have no default or another value than it; of sections in a list likewise."""
    return {key: value for key, value, changed in _walk(config, "", shorten=True) if changed}


def _walk(section: Section, prefix: str, *, shorten: bool = False) -> list[tuple[str, Any, bool]]:
    dumped = section.model_dump(mode="json")
    found: list[tuple[str, Any, bool]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found += _walk(value, f"{prefix}{name}.", shorten=shorten)
        else:
            if shorten and isinstance(value, tuple):
                pairs = zip(value, dumped[name], strict=True)
                dumped[name] = [changed_settings(item) if isinstance(item, Section) else plain for item, plain in pairs]
            changed = field.is_required() or value != field.get_default(call_default_factory=True)
            found.append((f"{prefix}{name}", dumped[name], changed))
    return found
