"""What an optimizer does not go with, known from its row before anything starts."""

from raylm.config import TrainConfig
from raylm.config.training import OptimizerSection
from raylm.errors import ConfigError
from raylm.optim.table import OPTIMIZERS, STRATEGIES, excluded_strategies, optimizer_row


def check_optimizer_use(config: TrainConfig) -> None:
    """Raises ConfigError where strategy, method, schedule or another average would make the optimizer wrong."""
    name = config.optimizer.name
    row = optimizer_row(name)
    found = excluded_strategies(row)
    if config.strategy in found:
        works = [strategy for strategy in STRATEGIES if strategy not in found]
        raise ConfigError(
            "optimizer.name",
            f"{name} excludes training.strategy={config.strategy}: {found[config.strategy]}.",
            f"Set training.strategy={' or '.join(works)}, or another optimizer: {', '.join(_usable(config.strategy))}.",
        )
    if row.estimates and config.training.method == "lisa":
        interval, every = config.lisa_or_default.interval_steps, {**row.options, **config.optimizer.options}
        if interval % int(every["hessian_interval_steps"]):
            raise ConfigError(
                "lisa.interval_steps",
                f"{interval} is not a multiple of {name}'s hessian_interval_steps={every['hessian_interval_steps']:g}: "
                "blocks would begin without an estimate.",
                "Change one of them.",
            )
    if row.paged and config.training.method == "lisa":
        raise ConfigError(
            "optimizer.name",
            f"{name} excludes training.method=lisa: bitsandbytes keeps the pages of blocks that rest for ever.",
            f"Set optimizer.name={name.removeprefix('paged_')}.",
        )
    if not row.averages:
        return
    if config.training.method == "lisa":
        raise ConfigError(
            "optimizer.name",
            f"{name} excludes training.method=lisa, which frees the averages of blocks that rest.",
            "Set optimizer.name=adamw.",
        )
    if config.training.ema_decay is not None:
        raise ConfigError(
            "optimizer.name", f"{name} excludes training.ema_decay: it averages weights itself.", "Drop the decay."
        )
    if config.schedule.name != "constant":
        raise ConfigError(
            "optimizer.name",
            f"{name} excludes schedule.name={config.schedule.name}: its average stands for the fall of the rate.",
            "Set schedule.name=constant; schedule.warmup_steps works.",
        )


def plannable(section: OptimizerSection, strategy: str) -> bool:
    """Whether an optimizer works under a strategy."""
    return strategy not in excluded_strategies(optimizer_row(section.name))


def _usable(strategy: str) -> list[str]:
    return [name for name, row in OPTIMIZERS.items() if strategy not in excluded_strategies(row)]
