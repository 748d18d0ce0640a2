"""`raylm`: parse, load the configuration, call one function.

Exit code 0: done; 2: a fault the user can mend, in one line; 3: done, but for rows that could not be answered; 1: a
bug, with its traceback. With --json the result is one JSON object on stdout, and everything else goes to stderr.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

import raylm
from raylm.cli import data, generation, models, runs, serving, speculation, training
from raylm.errors import RaylmError

# In the order of `raylm --help`.
_COMMANDS = (
    training.add,
    serving.add,
    speculation.add_bench,
    generation.add,
    speculation.add_distillation,
    data.add,
    models.add_vocabulary,
    serving.add_metrics,
    models.add_optimizers,
    models.add_adapters,
    runs.add,
    training.add_config,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("ray", "httpx", "matplotlib", "torch", "transformers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code: int = options.run(options) or 0
    except RaylmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    return code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line. What argparse leaves over behind an option goes where it would have gone before
    it: prompts, or settings. Exits with a usage message for anything else."""
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    place = next((name for name in ("prompts", "overrides") if name in options), None)
    odd = [item for item in extra if item.startswith("-") or ("=" not in item and place != "prompts")]
    if extra and (odd or place is None):
        parser.error(f"unrecognized arguments: {' '.join(odd or extra)}")
    if place is not None:
        setattr(options, place, [*getattr(options, place), *extra])
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raylm", description="Fine-tune, evaluate and serve large language models on Ray."
    )
    parser.add_argument("--version", action="version", version=f"raylm {raylm.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser
