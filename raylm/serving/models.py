"""The models of one application: each entry as arguments of its own, and the names that lead to it."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from raylm.config.serving import ModelArgs, ServeArgs
from raylm.errors import ConfigError
from raylm.serving.api_key import read_api_keys
from raylm.serving.engine_args import model_name

_OF_A_MODEL = set(ModelArgs.model_fields)
_OF_ONE_ENTRY = {"model", "name", "aliases"}
_ADAPTERS = {"adapter", "adapters"}


def models_of(args: ServeArgs) -> list[ServeArgs]:
    """One ServeArgs for each model, with its name set, and nothing in it of the others or of the application.

    Keys of a model that stand beside `models` are the defaults of its entries; the two `engine` mappings are joined,
    and an entry's `adapter` or `adapters` stands for both.
    Raises ConfigError when a name or alias is there twice, or an entry and its defaults do not fit together.
    """
    entries: Sequence[ModelArgs] = args.models or [args]
    shared = args.model_dump(include=_OF_A_MODEL - _OF_ONE_ENTRY, exclude_unset=True)
    models = []
    for index, entry in enumerate(entries):
        own = entry.model_dump(include=_OF_A_MODEL, exclude_unset=True)
        engine = {**shared.get("engine", {}), **own.get("engine", {})}
        replaced = _ADAPTERS if _ADAPTERS & own.keys() else set()
        defaults = {key: value for key, value in shared.items() if key not in replaced}
        model = _validated({**defaults, **own, "engine": engine}, f"models.{index}")
        models.append(model.model_copy(update={"name": model_name(model)}))
    _check_names(models, args)
    return models


def _validated(settings: dict[str, Any], where: str) -> ServeArgs:
    """The two halves are valid each by itself; what they make together may not be."""
    try:
        return ServeArgs.model_validate(settings)
    except ValidationError as error:
        problems = ". ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise ConfigError(
            where, f"does not fit to the keys beside models: {problems}.", "Change one of the two."
        ) from None


def names_of(model: ServeArgs) -> list[str]:
    """What clients may send as `model`, the name proper first."""
    return [model_name(model), *model.aliases]


def needs_gateway(args: ServeArgs) -> bool:
    """True when a request must be told apart or spread before it reaches an engine.

    Raises ConfigError where `gateway: never` cannot do what the rest asks for.
    """
    models = models_of(args)
    reasons = []
    if len(models) > 1:
        reasons.append("several models")
    reasons += [f"routing: {model.routing}" for model in models if model.routing != "balanced"]
    reasons += ["num_replicas: [min, max]" for model in models if model.is_autoscaled]
    if any(model.max_replicas > 1 for model in models) and _has_limits(args):
        reasons.append("limits over several replicas")
    if reasons and args.gateway == "never":
        raise ConfigError("gateway", f"is never, but {reasons[0]} needs one.", "Set gateway=auto.")
    return args.gateway == "always" or bool(reasons)


def _has_limits(args: ServeArgs) -> bool:
    """Whether anything is counted over requests: the queue, or a rate of all keys or of one."""
    limits = args.limits
    counted = (limits.max_concurrent, limits.requests_per_minute, limits.tokens_per_minute)
    rates = [(key.requests_per_minute, key.tokens_per_minute) for key in read_api_keys(args.api_key_file)]
    return any(value is not None for value in (*counted, *(rate for pair in rates for rate in pair)))


def deployment_name(model: ServeArgs) -> str:
    """Name of the model's Serve deployment behind a gateway: letters, digits, dots, dashes and underscores."""
    return "engine-" + re.sub(r"[^\w.-]", "-", model_name(model))


def _check_names(models: Sequence[ServeArgs], args: ServeArgs) -> None:
    seen: dict[str, str] = {}
    deployments: dict[str, str] = {}
    for index, model in enumerate(models):
        where = f"models.{index}" if args.models else "aliases"
        for name in names_of(model):
            if name in seen:
                raise ConfigError(where, f"the name {name!r} is that of {seen[name]} as well.", "Give it another.")
            seen[name] = where
        other = deployments.setdefault(deployment_name(model), where)
        if other != where:
            raise ConfigError(
                where, f"the name {model.name!r} is too like that of {other}.", "Differ in letters or digits."
            )
