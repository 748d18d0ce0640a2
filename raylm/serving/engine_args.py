"""Our configuration as the command line of vLLM's server: plain strings, so vLLM's own parser checks them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.config.serving import ServeArgs
from raylm.models.drafts import engine_options
from raylm.serving.adapter_survey import engine_settings, open_adapters
from raylm.serving.tool_parsers import tool_settings

# Set by a field of ours, or by Ray Serve, which does the listening.
RESERVED = {
    "model": "model",
    "served_model_name": "name",
    "max_model_len": "max_model_len",
    "dtype": "dtype",
    "api_key": "api_key_file",
    "host": "host",
    "port": "port",
    "ssl_certfile": "tls_cert_file",
    "ssl_keyfile": "tls_key_file",
}


# Of these vLLM's parser wants the list as one JSON word.
JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")


def model_name(args: ServeArgs) -> str:
    """What clients send as `model`: `name`, else the last part of the path without .gguf."""
    return args.name or Path(args.model).expanduser().absolute().name.removesuffix(".gguf")


def adapter_model(args: ServeArgs) -> str | None:
    """What clients send as `model` for the single `adapter` of a configuration; None where it has none."""
    root = open_adapters(args) if args.adapter is not None else None
    return f"{model_name(args)}:{root.names()[0]}" if root is not None else None


def command_line(args: ServeArgs, folder: str, *, on_cpu: bool, native_bf16: bool) -> list[str]:
    """Arguments for vLLM's `make_arg_parser`; `engine` comes last and wins over our defaults.

    folder: what `as_folder` gave for the model. on_cpu, native_bf16: what the replica's machine is. Raises ModelError
    where the draft of `speculation` does not fit the model, ConfigError where `engine` sets what that needs.
    """
    names = [model_name(args), *args.aliases]
    settings: dict[str, Any] = {"model": folder, "served_model_name": names, "dtype": args.dtype}
    if args.max_model_len is not None:
        settings["max_model_len"] = args.max_model_len
    if on_cpu:
        settings["enforce_eager"] = True
        settings["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
        if args.dtype == "auto":
            settings["dtype"] = "bfloat16" if native_bf16 else "float32"
    settings |= engine_options(
        args.speculation, folder, use_gpu=not on_cpu, max_model_len=args.max_model_len, engine=args.engine
    )
    settings |= engine_settings(args, on_cpu=on_cpu)  # its worker extension brings that of speculation as well
    settings |= tool_settings(args.tool_parser, args.engine, folder) | args.engine
    return [word for key, value in settings.items() for word in _words(key, value)]


def _words(key: str, value: Any) -> list[str]:
    """One argument as vLLM's configuration files spell it; None leaves it out."""
    flag = f"--{key.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [flag, json.dumps(dict(value))]
    if key in JSON_LISTS:
        return [flag, json.dumps([value] if isinstance(value, str) else list(value))]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]
