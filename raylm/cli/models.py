"""vocab extend, optim list, adapter merge: folders made of folders, and the optimizers there are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import raylm
from raylm.cli.arguments import add_command, add_group


def add_vocabulary(commands: Any) -> None:
    """Declares vocab extend."""
    vocabulary = add_group(commands, "vocab", "change vocabularies")
    extend = add_command(vocabulary, "extend", _extend, "add learnt pieces and tokens to a tokenizer and its model")
    extend.add_argument("model", help="hub id, folder, or GGUF file")
    extend.add_argument("--output", required=True, help="folder for the extended model")
    extend.add_argument("--corpus", nargs="+", metavar="FILE", help="datasets to learn pieces from, in any format")
    extend.add_argument("--size", type=int, metavar="N", help="pieces to learn")
    extend.add_argument("--min-frequency", type=int, metavar="N", help="tokens of the corpus a piece must save")
    extend.add_argument("--tokens", metavar="FILE", help="texts that become one token each: one a line, or a JSON list")
    extend.add_argument("--special", nargs="+", metavar="TOKEN", help="control tokens, such as '<|act|>'")
    extend.add_argument(
        "--pad-to-multiple-of", type=int, metavar="K", help="fill the rows up to a multiple with pieces"
    )


def add_optimizers(commands: Any) -> None:
    """Declares optim list."""
    optimizers = add_group(commands, "optim", "look at optimizers")
    add_command(optimizers, "list", _optimizers, "list the optimizers, what they keep and where they work")


def add_adapters(commands: Any) -> None:
    """Declares adapter merge."""
    adapter = add_group(commands, "adapter", "work with LoRA adapters")
    merge = add_command(adapter, "merge", _merge, "write an adapter and its base as one model folder")
    merge.add_argument("adapter", help="adapter folder, such as RUN/adapter")
    merge.add_argument("--output", required=True, help="folder for the model")
    merge.add_argument("--base", help="base model (default: the one the adapter names)")


def _extend(options: Any) -> None:
    from raylm.data.texts import read_token_list

    names = ("model", "output", "corpus", "size", "min_frequency", "special", "pad_to_multiple_of")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.tokens:
        given["tokens"] = read_token_list(Path(options.tokens))
    result = raylm.extend_vocabulary(given)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"model           {result.output}")
    print(f"new tokens      {result.tokens} given, {result.pieces} learnt, ids from {result.first_new_id}")
    print(f"rows            {result.rows_before} before, {result.rows} now")


def _optimizers(options: Any) -> None:
    from raylm.optim.listing import optimizer_facts, table_lines

    print(json.dumps(optimizer_facts()) if options.json else "\n".join(table_lines()))


def _merge(options: Any) -> None:
    result = raylm.merge_adapter(options.adapter, options.output, base=options.base)
    print(json.dumps(dataclasses.asdict(result)) if options.json else f"model           {result.output}")
