"""speculate bench, distill-draft: what speculative decoding gains, and a draft for it."""

import dataclasses
import json
from typing import Any

import raylm
from raylm.cli.arguments import add_command, add_group, add_overrides
from raylm.errors import ConfigError


def add_bench(commands: Any) -> None:
    """Declares speculate bench."""
    speculate = add_group(commands, "speculate", "measure speculative decoding")
    bench = add_command(speculate, "bench", _bench, "serve a model without and with speculation, and compare")
    bench.add_argument("model", help="hub id, folder, GGUF file, or YAML of a server")
    bench.add_argument(
        "--data", action="append", default=[], metavar="FILE", help="dataset to ask (default: edit tasks)"
    )
    bench.add_argument("--concurrency", default="1,16,64", metavar="N,…", help="requests at a time (default 1,16,64)")
    bench.add_argument("--max-tokens", type=int, default=128, metavar="N", help="length of an answer (default 128)")
    add_overrides(bench)


def add_distillation(commands: Any) -> None:
    """Declares distill-draft."""
    distill = add_command(commands, "distill-draft", _distill, "make and train a draft for speculative decoding")
    distill.add_argument("model", help="model to draft for: hub id, folder, or GGUF file")
    distill.add_argument("--data", action="append", required=True, metavar="FILE", help="dataset with prompts")
    distill.add_argument("--output", required=True, help="folder for the draft")
    distill.add_argument("--layers", metavar="N,…", help="blocks of the model to take, such as 0,10,19,29")
    distill.add_argument("--num-layers", type=int, metavar="N", help="blocks to take (default: an eighth)")
    distill.add_argument("--hidden-size", type=int, metavar="N", help="width of a new draft, in place of blocks")
    add_overrides(distill)


def _bench(options: Any) -> None:
    counts = options.concurrency.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise ConfigError("--concurrency", f"{options.concurrency} is not a list of counts, such as 1,16,64.")
    result = raylm.bench_speculation(
        options.model,
        options.overrides,
        data=options.data,
        concurrencies=[int(count) for count in counts],
        max_tokens=options.max_tokens,
    )
    from raylm.serving.speculation_bench import as_json, table_lines

    print(json.dumps(as_json(result)) if options.json else "\n".join(table_lines(result)))


def _distill(options: Any) -> None:
    names = ("model", "data", "output", "num_layers", "hidden_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.layers is not None:
        given["layers"] = options.layers.split(",")
    result = raylm.distill_draft(given, options.overrides)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"draft           {result.output}")
    print(f"parameters      {result.parameters / 1e6:.1f} million, the model has {result.target_parameters / 1e6:.1f}")
    for name, found in (("before", result.before), ("after", result.after)):
        rate, length = found["acceptance_rate"] or 0.0, found["mean_accepted_length"] or 1.0
        print(f"accepted {name:7}{rate:.1%} of the guesses, {length:.2f} tokens a step")
    print(f"a guess costs   {result.cost_ratio:.2f} of a token of the model")
    print(f"speed-up        {result.predicted_speed_up:.2f} predicted, {result.measured_speed_up:.2f} measured")
    print(f"same answers    {result.same_answers:.0%}")
    print(f"serve the pair  {result.serve}")
