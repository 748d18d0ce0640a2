"""A plan as text for people."""

from collections.abc import Sequence

from raylm.training.planning.memory import Memory
from raylm.training.planning.plan import Plan
from raylm.words import counted

GIB = 2**30


def plan_lines(plan: Plan) -> list[str]:
    """What `raylm plan` prints."""
    sequences = counted(plan.sequences, "sequence")
    share = 100 * plan.trainable_parameters / plan.parameters
    origin = {
        "cache": "from the cache of tokenised rows",
        "tokenised": "counted",
        "sample": "estimated from the first rows of each file",
        "beginning": "of the first rows of each file; the rest is of unknown size",
    }[plan.data_source]
    least = "at least " if plan.data_source == "beginning" else "about " if plan.data_source == "sample" else ""
    epochs = ", ".join(map(str, dict.fromkeys(plan.steps_per_epoch)))
    lines = [
        f"model           {plan.model}",
        f"method          {plan.method}",
        f"learns          {plan.trainable_parameters:,} of {plan.parameters:,} parameters ({share:.2f} %)",
        f"run             {plan.strategy}, workers: {plan.workers}, {plan.device}, {plan.precision}",
        f"data            {sequences}, {100 * plan.loss_share:.0f} % of tokens carry loss ({origin})",
        f"steps           {least}{plan.steps:,}; an epoch has {least}{epochs}",
        f"tokens          {plan.tokens_per_step:,} a step, {plan.tokens:,} in all",
        f"learning rate   {', '.join(f'{rate:.3g} at step {step}' for step, rate in plan.rates)}",
        f"FLOPs           {plan.flops_per_token:.3g} a token, {plan.flops:.3g} in all",
        f"time            {_duration(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s ({plan.rate_source})",
        "",
        f"memory of one rank in GiB; {_amount(plan.limit_bytes)} are there ({plan.limit_source})",
        *_table(plan.memory),
    ]
    if plan.program_bytes:
        lines.append(f"A worker's program takes {_amount(plan.program_bytes)} besides.")
    if not plan.fits:
        lines.append(f"{plan.strategy} does not fit.")
    return lines


def _table(rows: Sequence[Memory]) -> list[str]:
    heads = ("weights", "gradients", "optimizer", "activations", "loss", "communication", "loading", "peak", "host")
    cells = [["", "workers", *heads, "fits"]]
    for row in rows:
        values = [_amount(getattr(row, head)) for head in heads]
        mark, fits = "*" if row.chosen else " ", "yes" if row.fits else "no"
        cells.append([f"{mark} {row.name}", str(row.workers), *values, fits])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])  # names left, figures right
        for line in cells
    ]


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
