"""The optimizers, one row each. Plain data: readable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raylm.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRow:
    """Where an optimizer lives, how it is called, and what strategies, plans and sweeps have to know about it.

    factory: "package.module:attribute", imported on use.
    options: its arguments, with the defaults of `source` (else of `note`).
    decay: "decoupled", or "L2", which is added to the gradient.
    learning_rates: lowest and highest peak rate worth trying in fine-tuning.
    state_full: tensors of the weight's shape that are kept, in numbers of state_bits; fp32 besides are state_vectors of
    its rows and of its columns, state_rows of its rows, state_squares of rows x rows and of columns x columns, and
    state_low_rank of rank x its longer side, with a projection of rank x the shorter.
    whole: what it takes of a whole weight, which a piece of one does not have; empty for elementwise updates. Where
    weights are cut, one rank brings each together and steps it.
    counters: numbers that the library keeps for a group, which `counted` keeps for each parameter.
    heads_apart: query and key matrices are in groups of their own, with the rows of a head as `block_rows`.
    hidden_apart: matrices inside decoder blocks are in groups of their own, marked `hidden`.
    averages: weights to evaluate and export are others than those that are trained (schedule-free).
    paged: its library never gives memory back.
    estimates: the loop runs an extra pass every `hessian_interval_steps` for it.
    note: where it differs from its source.
    """

    factory: str
    source: str
    learning_rates: tuple[float, float]
    options: dict[str, Any] = field(default_factory=dict)
    decay: Literal["decoupled", "L2"] = "decoupled"
    state_full: int = 2
    state_bits: int = 32
    state_vectors: int = 0
    state_rows: int = 0
    state_squares: int = 0
    state_low_rank: int = 0
    whole: str = ""
    counters: tuple[str, ...] = ()
    hidden_apart: bool = False
    heads_apart: bool = False
    paged: bool = False
    averages: bool = False
    estimates: bool = False
    note: str = ""


_COUNT = ("step",)

OPTIMIZERS = {
    "adabelief": OptimizerRow(
        factory="pytorch_optimizer:AdaBelief",
        source="arXiv:2010.07468, Algorithm 2",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-16},
        counters=_COUNT,
    ),
    "adabound": OptimizerRow(
        factory="pytorch_optimizer:AdaBound",
        source="arXiv:1902.09843, Algorithm 1",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "final_lr": 1e-3, "gamma": 1e-3, "eps": 1e-8},
        counters=_COUNT,
        note="final_lr is 1e-3, not 0.1: the bounds end at SGD's rate, and rates of fine-tuning are lower. It follows "
        "the schedule. Moments are bias-corrected, and the rate is not divided by sqrt(t).",
    ),
    "adadelta": OptimizerRow(
        factory="torch.optim:Adadelta",
        source="arXiv:1212.5701, Algorithm 1",
        learning_rates=(0.01, 1.0),
        options={"rho": 0.9, "eps": 1e-6},
        decay="L2",
    ),
    "adafactor": OptimizerRow(
        factory="torch.optim:Adafactor",
        source="arXiv:1804.04235, Algorithm 5",
        learning_rates=(1e-4, 1e-2),
        options={"beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0},
        state_full=0,
        state_vectors=1,
        whole="rows, columns, norms of weight and update",
        note="eps[0] is that of the dtype, not 1e-30. A step is min(rate, 1/sqrt(t)) times the weight's root mean "
        "square.",
    ),
    "adagrad": OptimizerRow(
        factory="raylm.optim.adagrad:Adagrad",
        source="Duchi, Hazan and Singer, JMLR 12 (2011)",
        learning_rates=(1e-5, 1e-3),
        options={"eps": 1e-10},
        decay="L2",
        state_full=1,
        note="torch.optim's function; state exists from a parameter's first step on.",
    ),
    "adam": OptimizerRow(
        factory="torch.optim:Adam",
        source="arXiv:1412.6980, Algorithm 1",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "fused": True},
        decay="L2",
    ),
    "adam_mini": OptimizerRow(
        factory="raylm.optim.adam_mini:AdamMini",
        source="arXiv:2406.16793, Algorithms 1 and 3",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8},
        state_full=1,
        state_rows=1,
        whole="means of squares over rows and heads",
        heads_apart=True,
        note="ours: pytorch-optimizer 4.1.0 has the first version's partition. Rows of matrices, heads of queries and "
        "keys where they are modules of their own (q_proj, k_proj, query, key), whole vectors. Rows are as "
        "stored: inputs, not outputs, in GPT-2 and GPT-OSS.",
    ),
    "adamax": OptimizerRow(
        factory="torch.optim:Adamax",
        source="arXiv:1412.6980, Algorithm 2",
        learning_rates=(2e-6, 2e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8},
        decay="L2",
        note="eps is added to the gradient's size before the maximum.",
    ),
    "adamp": OptimizerRow(
        factory="pytorch_optimizer:AdamP",
        source="arXiv:2006.08217, Algorithm 2",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "delta": 0.1, "wd_ratio": 0.1},
        whole="norms and products of weight, gradient and update",
        counters=_COUNT,
        note="eps is added before the bias correction. As in the authors' code, the bound has sqrt(columns).",
    ),
    "adamw": OptimizerRow(
        factory="torch.optim:AdamW",
        source="arXiv:1711.05101, Algorithm 2",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "fused": True},
    ),
    "adamw_8bit": OptimizerRow(
        factory="raylm.optim.eight_bit:AdamW",
        source="arXiv:1711.05101, Algorithm 2; arXiv:2110.02861",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "min_8bit_size": 4096},
        state_bits=8,
        whole="blocks of 256 elements with a scale each",
        note="bitsandbytes', on CPUs too. Parameters of fewer than min_8bit_size elements keep fp32 state.",
    ),
    "adan": OptimizerRow(
        factory="pytorch_optimizer:Adan",
        source="arXiv:2208.06677, Algorithm 1",
        learning_rates=(5e-6, 5e-4),
        options={"betas": (0.98, 0.92, 0.99), "eps": 1e-8, "foreach": False},
        state_full=4,
        counters=_COUNT,
        note="decay divides the weight by 1 + rate x decay. foreach, which is faster on GPUs, does not run on the "
        "pieces of fsdp. betas are 1 minus the paper's. Moments are bias-corrected, as in the authors' code.",
    ),
    "ademamix": OptimizerRow(
        factory="pytorch_optimizer:AdEMAMix",
        source="arXiv:2409.03137, Algorithm 1",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8, "weight_decouple": True},
        state_full=3,
        counters=_COUNT,
        note="decay comes first and has the rate alone, as AdamW's. Set t_alpha_beta3 to the number of steps for the "
        "paper's warm-up of alpha and beta3.",
    ),
    "apollo": OptimizerRow(
        factory="raylm.optim.low_rank:Apollo",
        source="arXiv:2412.05270, Algorithm 1",
        learning_rates=(1e-5, 1e-3),
        options={
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "rank": 128,
            "interval_steps": 200,
            "scale": 1.0,
            "scale_type": "channel",
            "max_growth": 1.01,
        },
        state_full=0,
        state_low_rank=2,
        whole="projections of the gradient, its channels' and its update's norms",
        hidden_apart=True,
        note="ours: pytorch-optimizer 4.1.0 projects the scaled gradient and back; in the paper the whole one is "
        "scaled. Matrices inside decoder blocks; the rest takes AdamW (2 floats). APOLLO-Mini: rank=1, "
        "scale_type=tensor, scale=11.3.",
    ),
    "came": OptimizerRow(
        factory="pytorch_optimizer:CAME",
        source="arXiv:2307.02047, Algorithm 2",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999, 0.9999), "eps1": 1e-30, "eps2": 1e-16, "clip_threshold": 1.0},
        state_full=1,
        state_vectors=2,
        whole="rows, columns, norm of the update",
        note="vectors have no confidence, as in the authors' code. eps2 is added to the squared residual.",
    ),
    "galore": OptimizerRow(
        factory="raylm.optim.low_rank:GaLore",
        source="arXiv:2403.03507, Algorithm 2",
        learning_rates=(1e-5, 1e-3),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "rank": 128, "interval_steps": 200, "scale": 0.25},
        state_full=0,
        state_low_rank=2,
        whole="singular vectors of the gradient",
        hidden_apart=True,
        note="ours: pytorch-optimizer 4.1.0 keeps the projection where no checkpoint can hold it, and makes it anew "
        "one step early. Matrices inside decoder blocks; the rest takes AdamW (2 floats).",
    ),
    "lamb": OptimizerRow(
        factory="raylm.optim.lamb:Lamb",
        source="arXiv:1904.00962, Algorithm 2",
        learning_rates=(1e-5, 1e-3),
        options={"betas": (0.9, 0.999), "eps": 1e-6},
        whole="norms of weight and update",
        counters=_COUNT,
        note="ours: pytorch-optimizer 4.1.0 does not correct the second moment's bias, puts the decay outside the "
        "trust ratio, and cuts the weight's norm at 10.",
    ),
    "lars": OptimizerRow(
        factory="pytorch_optimizer:LARS",
        source="arXiv:1708.03888, Algorithm 1",
        learning_rates=(1e-2, 10.0),
        options={"momentum": 0.9, "trust_coefficient": 1e-3},
        decay="L2",
        state_full=1,
        whole="norms of weight and gradient",
        note="the rate multiplies the momentum, not what goes into it. Vectors take plain momentum steps.",
    ),
    "lion": OptimizerRow(
        factory="pytorch_optimizer:Lion",
        source="arXiv:2302.06675, Algorithm 2",
        learning_rates=(1e-7, 3e-5),
        options={"betas": (0.9, 0.99)},
        state_full=1,
    ),
    "lion_8bit": OptimizerRow(
        factory="raylm.optim.eight_bit:Lion",
        source="arXiv:2302.06675, Algorithm 2; arXiv:2110.02861",
        learning_rates=(1e-7, 3e-5),
        options={"betas": (0.9, 0.99), "min_8bit_size": 4096},
        state_full=1,
        state_bits=8,
        whole="blocks of 256 elements with a scale each",
        note="bitsandbytes', on CPUs too. Parameters of fewer than min_8bit_size elements keep fp32 state.",
    ),
    "muon": OptimizerRow(
        factory="raylm.optim.muon:MuonWithAdamW",
        source="arXiv:2502.16982, Algorithm 1",
        learning_rates=(1e-6, 1e-4),
        options={"momentum": 0.95, "nesterov": True, "ns_steps": 5, "betas": (0.9, 0.999), "eps": 1e-8},
        state_full=1,
        whole="the matrix, which is orthogonalised",
        hidden_apart=True,
        note="matrices inside decoder blocks; embedding, output layer, norms and biases take torch.optim's AdamW "
        "(2 floats) at the same rate. ours: torch.optim's orthogonalises in bfloat16, for which CPUs without products "
        "of it take many times as long.",
    ),
    "nadam": OptimizerRow(
        factory="torch.optim:NAdam",
        source="Dozat, ICLR workshop 2016, Algorithm 8",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3, "decoupled_weight_decay": True},
    ),
    "novograd": OptimizerRow(
        factory="pytorch_optimizer:NovoGrad",
        source="arXiv:1905.11286, Algorithm 1",
        learning_rates=(1e-5, 1e-3),
        options={"betas": (0.95, 0.98), "eps": 1e-8},
        decay="L2",
        state_full=1,
        whole="the gradient's norm",
        note="decay is added to the normalised gradient, as in the paper.",
    ),
    "paged_adamw_8bit": OptimizerRow(
        factory="raylm.optim.eight_bit:PagedAdamW",
        source="arXiv:1711.05101, Algorithm 2; arXiv:2110.02861",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "min_8bit_size": 4096},
        state_bits=8,
        whole="blocks of 256 elements with a scale each",
        paged=True,
        note="as adamw_8bit, with state in pages that the driver moves between GPU and host; on CPUs there are none.",
    ),
    "paged_lion_8bit": OptimizerRow(
        factory="raylm.optim.eight_bit:PagedLion",
        source="arXiv:2302.06675, Algorithm 2; arXiv:2110.02861",
        learning_rates=(1e-7, 3e-5),
        options={"betas": (0.9, 0.99), "min_8bit_size": 4096},
        state_full=1,
        state_bits=8,
        whole="blocks of 256 elements with a scale each",
        paged=True,
        note="as lion_8bit, with state in pages that the driver moves between GPU and host; on CPUs there are none.",
    ),
    "radam": OptimizerRow(
        factory="torch.optim:RAdam",
        source="arXiv:1908.03265, Algorithm 2",
        learning_rates=(1e-6, 1e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": True},
        note="rectified from a length of 5 on, not 4, as in the authors' code.",
    ),
    "rmsprop": OptimizerRow(
        factory="torch.optim:RMSprop",
        source="Tieleman and Hinton, lecture 6e, 2012",
        learning_rates=(1e-6, 1e-4),
        options={"alpha": 0.99, "eps": 1e-8},
        decay="L2",
        state_full=1,
    ),
    "schedulefree_adamw": OptimizerRow(
        factory="pytorch_optimizer:ScheduleFreeAdamW",
        source="arXiv:2405.15682, Algorithm 1",
        learning_rates=(2e-6, 3e-4),
        options={"betas": (0.9, 0.999), "eps": 1e-8},
        counters=("step", "weight_sum", "lr_max"),
        averages=True,
        note="decay acts at the point where the gradient is taken, as in the authors' code. 1e-15 is "
        "added to the second moment.",
    ),
    "schedulefree_sgd": OptimizerRow(
        factory="pytorch_optimizer:ScheduleFreeSGD",
        source="arXiv:2405.15682, equations 1 to 3",
        learning_rates=(1e-3, 1.0),
        options={"momentum": 0.9},
        decay="L2",
        state_full=1,
        counters=("step", "weight_sum", "lr_max"),
        averages=True,
    ),
    "sgd": OptimizerRow(
        factory="torch.optim:SGD",
        source="Sutskever and others, ICML 2013",
        learning_rates=(1e-4, 1e-1),
        options={"momentum": 0.9},
        decay="L2",
        state_full=1,
        note="the rate multiplies the momentum, not what goes into it.",
    ),
    "sgdp": OptimizerRow(
        factory="pytorch_optimizer:SGDP",
        source="arXiv:2006.08217, Algorithm 1",
        learning_rates=(1e-4, 1e-1),
        options={"momentum": 0.9, "delta": 0.1, "wd_ratio": 0.1},
        state_full=1,
        whole="norms and products of weight, gradient and update",
        note="decay is divided by 1 - momentum, as in the authors' code.",
    ),
    "soap": OptimizerRow(
        factory="raylm.optim.soap:Soap",
        source="arXiv:2409.11321, Algorithm 3",
        learning_rates=(1e-6, 1e-4),
        options={
            "betas": (0.95, 0.95),
            "eps": 1e-8,
            "precondition_frequency": 10,
            "max_precondition_dim": 10000,
        },
        state_squares=2,
        whole="products of the matrix with itself, and their eigenvectors",
        counters=_COUNT,
        note="sides longer than max_precondition_dim have no basis. eps is added before the bias correction. As in the "
        "authors' code, the first step of a parameter only makes its bases, and decay comes after the update.",
    ),
    "sophia": OptimizerRow(
        factory="raylm.optim.sophia:Sophia",
        source="arXiv:2305.14342, Algorithms 2 and 3",
        learning_rates=(5e-7, 5e-5),
        options={"betas": (0.96, 0.99), "gamma": 0.05, "eps": 1e-12, "hessian_interval_steps": 10},
        estimates=True,
        note="Sophia-G, ours: an extra pass over every hessian_interval_steps-th global batch, with labels drawn from "
        "the model, estimates the curvature.",
    ),
    "yogi": OptimizerRow(
        factory="pytorch_optimizer:Yogi",
        source="Zaheer and others, NeurIPS 2018, Algorithm 2",
        learning_rates=(1e-5, 1e-3),
        options={"betas": (0.9, 0.999), "initial_accumulator": 1e-6, "eps": 1e-3},
        counters=_COUNT,
        note="moments are bias-corrected, and the first one starts at initial_accumulator too.",
    ),
}

STRATEGIES = ("single", "ddp", "fsdp", "deepspeed")


def optimizer_row(name: str) -> OptimizerRow:
    """The row of a name. Raises ConfigError."""
    if name not in OPTIMIZERS:
        raise ConfigError("optimizer.name", f"{name!r} is not an optimizer.", nearest(name, OPTIMIZERS))
    return OPTIMIZERS[name]


def averaging_option(row: OptimizerRow) -> str | None:
    """The option, the first of a pair, that says what share of the averaged weights those have that are trained; None
    where an optimizer averages none."""
    if not row.averages:
        return None
    return "betas" if "betas" in row.options else "momentum"


def excluded_strategies(row: OptimizerRow) -> Mapping[str, str]:
    """Strategy that an optimizer would be wrong under -> why."""
    if row.averages:
        return {"deepspeed": "its averaged weights are not at hand while ZeRO steps flat pieces"}
    return {}
