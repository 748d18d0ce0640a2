"""Memory of one rank by part, for each way to share a model among ranks.

What a strategy holds is counted from the parameters' shapes; activations and the loss come from trace.py. Peaks are the
most bytes of tensors at any time of a step or of loading. What the allocator keeps besides (fragments) and the program
itself are not in them. benchmarks/plan_memory.py holds them against real runs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from raylm.config import TrainConfig
from raylm.config.deepspeed import deepspeed_config
from raylm.models.blocks import decoder_blocks
from raylm.optim.checks import plannable
from raylm.training.module import LossModule
from raylm.training.planning.optimizer_state import is_owned, owned_bytes, state_bytes
from raylm.training.planning.trace import Traced, trace_micro_batch

FP32 = 4
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit element with its share of the scales, which are quantised in turn (arXiv:2305.14314)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a strategy with some settings shares the model.

    cut: what each rank holds a part of (w weights, g gradients, o optimizer state); offload: what lies in host memory;
    whole_gradients: they are whole until the last micro-batch; copies: of the gradients, in buckets that are exchanged;
    master: a second fp32 copy of what a rank steps; buckets: DeepSpeed's buffers; gathers: which weights are whole at
    work, the `block` at hand or `all`.
    """

    strategy: str
    section: dict[str, Any] = field(default_factory=dict)
    cut: str = ""
    whole_gradients: bool = False
    copies: int = 0
    master: bool = False
    buckets: bool = False
    gathers: str = ""
    offload: str = ""

    @property
    def name(self) -> str:
        """The strategy and its settings as the command line takes them."""
        shown = {key: value for key, value in self.section.items() if value != _DEFAULTS.get(key)}
        return " ".join((self.strategy, *(f"{key}={str(value).lower()}" for key, value in shown.items())))


_DEFAULTS = {"reshard_after_forward": True, "cpu_offload": False, "offload_optimizer": False, "offload_param": False}
_ZERO: dict[str, Any] = {"strategy": "deepspeed", "buckets": True}
LAYOUTS = (
    Layout(strategy="single", whole_gradients=True),
    Layout(strategy="ddp", whole_gradients=True),
    Layout(strategy="fsdp", section={"reshard_after_forward": True, "cpu_offload": False}, cut="wgo", gathers="block"),
    Layout(strategy="fsdp", section={"reshard_after_forward": False, "cpu_offload": False}, cut="wgo", gathers="all"),
    Layout(
        strategy="fsdp",
        section={"reshard_after_forward": True, "cpu_offload": True},
        cut="wgo",
        gathers="block",
        offload="wgo",
    ),
    Layout(section={"stage": 1}, cut="go", whole_gradients=True, master=True, **_ZERO),
    Layout(section={"stage": 2}, cut="go", master=True, **_ZERO),
    Layout(section={"stage": 2, "offload_optimizer": True}, cut="go", master=True, offload="go", **_ZERO),
    Layout(section={"stage": 3}, cut="wgo", gathers="block", **_ZERO),
    Layout(
        section={"stage": 3, "offload_optimizer": True, "offload_param": True},
        cut="wgo",
        gathers="block",
        master=True,
        offload="wgo",
        **_ZERO,
    ),
)
"""Every way to share a model that a plan shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    weights, gradients, optimizer: what it holds, a master copy counted with the optimizer; activations, loss: of one
    micro-batch; communication: gathered weights and buffers; loading: the most while weights load; peak: the most on
    the device at any time; host: offloaded parts, and the copy from which a checkpoint is written.
    """

    name: str
    workers: int
    chosen: bool
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    communication: int
    loading: int
    peak: int
    host: int
    fits: bool | None = None


def layout_of(config: TrainConfig) -> Layout:
    """The layout that a configuration chooses; one of LAYOUTS, or a variation of it that the table does not show."""
    chosen: dict[str, Any] = {}
    if config.strategy == "fsdp":
        chosen = config.fsdp_or_default.model_dump()
    if config.strategy == "deepspeed":
        chosen = config.deepspeed_or_default.model_dump(exclude={"config"})
    for layout in LAYOUTS:
        if layout.strategy == config.strategy and {key: chosen[key] for key in chosen if chosen[key]} == {
            key: value for key, value in layout.section.items() if value
        }:
            return layout
    if config.strategy == "deepspeed":
        return _zero_variation(chosen)
    offload, gathers = ("wgo", "block") if chosen["cpu_offload"] else ("", "all")
    gathers = gathers if chosen["reshard_after_forward"] else "all"
    return Layout(strategy="fsdp", section=chosen, cut="wgo", gathers=gathers, offload=offload)


def _zero_variation(chosen: dict[str, Any]) -> Layout:
    stage = chosen["stage"]
    if stage == 0:
        return Layout(strategy="deepspeed", section={"stage": 0}, whole_gradients=True, copies=1)
    offload = ("go" if chosen["offload_optimizer"] else "") + ("w" if chosen["offload_param"] else "")
    return Layout(
        section={key: value for key, value in chosen.items() if value},
        cut="wgo" if stage == 3 else "go",
        whole_gradients=stage == 1,
        gathers="block" if stage == 3 else "",
        master=stage < 3 or "o" in offload,
        offload=offload,
        **_ZERO,
    )


def memory_table(
    module: LossModule,
    config: TrainConfig,
    *,
    tokens: int,
    loss_tokens: int,
    sequences: int,
    precision: str,
    on_gpu: bool,
) -> list[Memory]:
    """Memory of one rank for every layout, the chosen one among them.

    module: on the meta device, with requires_grad as a step has it. tokens, loss_tokens, sequences: of a micro-batch.
    on_gpu: there is a device beside the host.
    """
    chosen = layout_of(config)
    shown = tuple(
        row
        for row in LAYOUTS
        if (on_gpu or not row.section.get("cpu_offload"))
        and row.strategy not in config.method.excluded
        and plannable(config.optimizer, row.strategy)
    )
    layouts = shown if chosen in shown else (*shown, chosen)
    blocks = _blocks(module)
    traces: dict[tuple[bool, bool], Traced] = {}

    def traced(scattered: bool, accumulated: bool) -> Traced:
        key = (scattered, accumulated)
        if key not in traces:
            traces[key] = trace_micro_batch(
                module,
                tokens=tokens,
                loss_tokens=loss_tokens,
                sequences=sequences,
                precision=precision,
                accumulated=accumulated,
                scattered=[p for block in blocks for p in block.parameters()] if scattered else (),
            )
        return traces[key]

    return [_memory(layout, module, config, blocks, traced, chosen=layout is chosen) for layout in layouts]


def _memory(
    layout: Layout,
    module: LossModule,
    config: TrainConfig,
    blocks: Sequence[nn.Module],
    traced: Callable[[bool, bool], Traced],
    *,
    chosen: bool,
) -> Memory:
    ranks = 1 if layout.strategy == "single" else config.cluster.max_workers
    accumulated = config.gradient_accumulation_steps(ranks) > 1
    everything = list(module.parameters())
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    names, learns = [name for name, _ in named], [parameter for _, parameter in named]
    cut = _by_rows if layout.strategy == "fsdp" else _by_elements
    whole = sum(p.numel() for p in everything) * FP32
    part = {kind: cut if kind in layout.cut else _whole for kind in "wgo"}
    parts = {kind: part[kind](learns if kind in "go" else everything, ranks) for kind in "wgo"}
    weights, gradients = sum(map(math.prod, parts["w"])) * FP32, sum(map(math.prod, parts["g"])) * FP32
    if config.method.quantized:
        saved = round(_frozen_matrices(blocks) * (FP32 - NF4))
        whole -= saved
        weights -= saved // ranks if "w" in layout.cut else saved
    optimizer, exchange = state_bytes(config.optimizer, parts["o"], names=names), 0
    if "o" in layout.cut and is_owned(config, layout.strategy):
        optimizer, exchange = owned_bytes(named, config, ranks)
    if config.training.ema_decay is not None:
        optimizer += sum(map(math.prod, parts["o"])) * FP32
    if layout.master:
        optimizer += sum(map(math.prod, parts["o"])) * FP32
    gathered = _gathered(layout, module, config, blocks, everything)
    bucket = _bucket(config, module, layout) if layout.buckets else 0
    exchanged = sum(p.numel() for p in learns) * FP32 * layout.copies
    trace = traced("g" in layout.cut and not layout.whole_gradients, accumulated)
    held = {"w": weights, "g": gradients, "o": optimizer}
    host = sum(size for kind, size in held.items() if kind in layout.offload)
    here = {kind: 0 if kind in layout.offload else size for kind, size in held.items()}
    standing = here["w"] + here["o"] + gathered + exchanged
    flat = here["g"] if (layout.buckets and "w" in layout.cut) or ("g" in layout.cut and accumulated) else 0
    bucket_stands = bucket if "w" in layout.cut else 0
    in_pass = standing + flat + bucket_stands + trace.peak
    in_update = here["w"] + here["o"] + here["g"] + exchanged + bucket
    in_update += max(exchange, _scattering(layout, module, blocks, learns))
    if config.checkpoint.asynchronous:
        host += _checkpoint(named, config, ranks)
    return Memory(
        name=layout.name,
        workers=ranks,
        chosen=chosen,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=trace.activations,
        loss=trace.loss,
        communication=gathered + exchanged + bucket,
        loading=whole,
        peak=max(in_pass, in_update, whole),
        host=host,
    )


def _frozen_matrices(blocks: Sequence[nn.Module]) -> int:
    """Elements of the linear modules that a 4-bit method quantises."""
    linear = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    return sum(part.weight.numel() for part in linear if not part.weight.requires_grad)


def _blocks(module: LossModule) -> list[nn.Module]:
    return list(decoder_blocks(module.model))


def _whole(parameters: Iterable[nn.Parameter], ranks: int) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in parameters]


def _by_rows(parameters: Iterable[nn.Parameter], ranks: int) -> list[tuple[int, ...]]:
    """FSDP's cut on the rank with the most."""
    return [(-(-p.shape[0] // ranks), *p.shape[1:]) for p in parameters]


def _by_elements(parameters: Iterable[nn.Parameter], ranks: int) -> list[tuple[int, ...]]:
    """DeepSpeed's cut."""
    return [(-(-p.numel() // ranks),) for p in parameters]


def _gathered(
    layout: Layout,
    module: LossModule,
    config: TrainConfig,
    blocks: Sequence[nn.Module],
    everything: Sequence[nn.Parameter],
) -> int:
    """Whole weights at hand: all outside the blocks, and of the blocks the one at work and the next, or all."""
    if not layout.gathers:
        return 0
    sizes = [sum(p.numel() for p in block.parameters()) * FP32 for block in blocks]
    outside = sum(p.numel() for p in everything) * FP32 - sum(sizes)
    at_work = outside + 2 * max(sizes)
    if layout.buckets:  # ZeRO-3 gives up what it gathered only beyond a number of parameters
        zero = _zero_config(config, module)
        limits = (zero.get(f"stage3_max_{name}", 10**9) for name in ("live_parameters", "reuse_distance"))
        return max(at_work, min(outside + sum(sizes), int(min(limits)) * FP32))
    return at_work + (sum(sizes) if layout.gathers == "all" else 0)


def _scattering(layout: Layout, module: LossModule, blocks: Sequence[nn.Module], learns: Sequence[nn.Parameter]) -> int:
    """At the end of FSDP's backward pass: weights and gradients outside the blocks, and a copy that is sent."""
    if layout.strategy != "fsdp":
        return 0
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(p.numel() for p in learns if id(p) not in inside) * FP32
    return sum(p.numel() for p in module.parameters() if id(p) not in inside) * FP32 + 2 * outside


def _bucket(config: TrainConfig, module: LossModule, layout: Layout) -> int:
    """DeepSpeed's buffer in which gradients are reduced; two where they are reduced while the pass goes on."""
    zero, stage = _zero_config(config, module), layout.section.get("stage")
    learns = sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = zero["reduce_bucket_size"] if stage == 3 else min(zero["reduce_bucket_size"], learns)
    return int(size) * FP32 * (2 if zero.get("overlap_comm") and stage != 3 else 1)


def _zero_config(config: TrainConfig, module: LossModule) -> dict[str, Any]:
    """DeepSpeed's settings, those of a user's JSON included where the run uses it."""
    own = config if config.strategy == "deepspeed" else config.model_copy(update={"deepspeed": None})
    hidden_size = module.model.config.get_text_config().hidden_size
    return dict(deepspeed_config(own, hidden_size=hidden_size)["zero_optimization"])


def _checkpoint(named: Sequence[tuple[str, nn.Parameter]], config: TrainConfig, ranks: int) -> int:
    """This rank's share of what a checkpoint holds."""
    shapes = [tuple(parameter.shape) for _, parameter in named]
    state = state_bytes(config.optimizer, shapes, names=[name for name, _ in named])
    return (sum(map(math.prod, shapes)) * FP32 + state) // ranks
