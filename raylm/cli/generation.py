"""generate: answers without a server."""

import contextlib
import dataclasses
import json
import sys
from typing import Any

import raylm
from raylm.cli.arguments import add_command
from raylm.errors import ConfigError


def add(commands: Any) -> None:
    """Declares generate."""
    generate = add_command(
        commands, "generate", _generate, "answer prompts or a dataset into JSONL or Parquet, resumable"
    )
    generate.add_argument("model", help="hub id, folder, or GGUF file")
    generate.add_argument("--adapter", metavar="DIR", help="LoRA adapter to answer with")
    generate.add_argument("prompts", nargs="*", help="prompts; key=value sets an option", metavar="PROMPT|key=value")


def _generate(options: Any) -> int:
    settings = [item for item in options.prompts if _is_setting(item)]
    prompts = [item for item in options.prompts if not _is_setting(item)]
    given = {"prompts": prompts, "adapter": options.adapter}
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it does about a lost worker
        result = raylm.generate({"model": options.model, **{k: v for k, v in given.items() if v}}, settings)
    failed = sum(result.failed.values())
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.failed.items())
        rate = f" ({result.tokens_per_second:.0f} tokens/s)" if result.tokens_per_second else ""
        print(f"{result.prompts - failed} answers, {result.tokens} tokens{rate}: {result.output}")
        if failed:
            print(f"{failed} rows failed, with their reasons in the output: {kinds}", file=sys.stderr)
    return 3 if failed else 0


def _is_setting(item: str) -> bool:
    """Whether an argument of `raylm generate` sets something. Raises ConfigError for a name that is nearly one."""
    import difflib
    import re

    from raylm.config import GenerateConfig

    key, sign, _ = item.partition("=")
    first = key.split(".")[0]
    if not sign or first in GenerateConfig.model_fields:
        return bool(sign)
    near = difflib.get_close_matches(first, GenerateConfig.model_fields, n=1, cutoff=0.8)
    if near and re.fullmatch(r"[\w.-]+", key):
        raise ConfigError(item, f"is neither a setting nor plainly a prompt. Did you mean {near[0]}?")
    return False
