"""The conditions of a space: a value that no setting can have is an error, one that no trial has is told."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from raylm.config import TrainConfig
from raylm.config.load import check_key, check_value
from raylm.errors import ConfigError, nearest
from raylm.optim.table import OPTIMIZERS
from raylm.tuning.space import OPTIMIZER_KEY, Space, holds, shown

logger = logging.getLogger(__name__)


def check_conditions(space: Space, base: Mapping[str, Any]) -> None:
    """Raises ConfigError for a `when` that names no setting or no value of it; warns of one that never holds here.
    base: what settings are where the space gives them no value, flat."""
    for key, alternatives in space.items():
        for dimension in alternatives:
            for name, wanted in dimension.when.items():
                where = f"space.{key}: when"
                check_key(TrainConfig, name, where)
                for value in _members(wanted):
                    check_value(TrainConfig, name, value, where)
                    if name == OPTIMIZER_KEY and value not in OPTIMIZERS:
                        raise ConfigError(where, f"{name} is never {value!r}.", nearest(str(value), OPTIMIZERS))
                if not _can_hold(name, wanted, space, base):
                    found = dict.fromkeys(shown(value) for value in _values(name, space, base))
                    logger.warning(
                        "%s: %s is never %s, but %s", where, name, shown(wanted), " or ".join(found) or "unset"
                    )


def _members(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


def _can_hold(name: str, wanted: Any, space: Space, base: Mapping[str, Any]) -> bool:
    for dimension in space.get(name, ()):
        if dimension.suggested:
            return True  # the range of an optimizer that is not chosen yet
        if dimension.is_range:
            low, high = dimension.bounds
            if any(isinstance(member, int | float) and low <= member <= high for member in _members(wanted)):
                return True
    return any(holds(value, wanted) for value in _values(name, space, base))


def _values(name: str, space: Space, base: Mapping[str, Any]) -> Iterator[Any]:
    """The values that a setting can have, of a range both ends."""
    for dimension in space.get(name, ()):
        if not dimension.suggested:
            yield from dimension.bounds if dimension.values is None else dimension.values
    if name in base:
        yield base[name]
