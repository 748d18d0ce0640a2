"""The faults a user can mend, one class per fault a caller can act on.

Everything else that is raised is a bug of ours and keeps its traceback. Each error says where the fault is, what it
is and what to do. The arguments are handed to `Exception` as given, so an error raised in a Ray worker unpickles on
the driver as itself.
"""

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends with: the name it may have been, or the names there are."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(names)}."


class RaylmError(Exception):
    """A fault the user can mend. The CLI prints it in one line and exits 2."""

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.where}: {self.problem}", self.remedy)))


class ConfigError(RaylmError):
    """A configuration that cannot be read, or whose values do not fit together."""


class DataError(RaylmError):
    """A dataset file or row that cannot be used."""


class ModelError(RaylmError):
    """A model folder, tokenizer or adapter that cannot be loaded, or does not fit the configuration."""


class RunDirError(RaylmError):
    """A run directory that cannot be written, or that belongs to another run."""


class CheckpointError(RaylmError):
    """A checkpoint that cannot be written, is incomplete, or belongs to another configuration."""


class ClusterError(RaylmError):
    """A cluster that cannot be reached or lacks what was asked of it."""


class ClusterTokenError(ClusterError):
    """A cluster that asks for a token that this process does not have."""


class TrainingError(RaylmError):
    """A training run that had to stop, such as a non-finite loss."""


class TrackingError(RaylmError):
    """A tracker that does not take the figures of a run."""


class ServingError(RaylmError):
    """A server that cannot start, or a request to one that failed."""
