"""Each rank holds a part of the optimizer state (stage 1), the gradients (2) and the weights (3): ZeRO, by DeepSpeed.

DeepSpeed settles what trains when its engine is made; what is set free later gets gradients and never learns. So the
engine is made at the first step, when weights and optimizer state are known, and made anew when LISA draws other
blocks. In between, optimizer state is kept by parameter: this rank's part of it under stage 3, all of it below.

Weights are fp32 under autocast, as in the other strategies; DeepSpeed then steps them in place, without a second copy.
"""

import gc
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylm.training.batch import Batch
from raylm.training.module import LossModule
from raylm.training.state import Piece, optimizer_slots, restore_weights, share_of
from raylm.training.strategies.base import BuildOptimizer
from raylm.training.strategies.deepspeed_engine import HandedOn, Wrapped, deepspeed_on, step_in_place
from raylm.training.strategies.owned import OwnedOptimizer, Part

Slots = dict[str, Tensor]
"""What an optimizer keeps for one parameter; 0-d tensors count steps."""


class DeepspeedStrategy:
    """Needs an initialised process group (gloo on CPUs, nccl on GPUs)."""

    def __init__(
        self,
        module: LossModule,
        build_optimizer: BuildOptimizer,
        device: torch.device,
        section: Mapping[str, Any],
    ) -> None:
        """section: what DeepSpeed is configured with (config/deepspeed.py)."""
        self.module, self.device = module, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._config, self._stage = section, section["zero_optimization"]["stage"]
        self.holds_whole_weights = self._stage < 3
        self._build = build_optimizer
        # Never steps: the loop sets rates in its groups, and the engine's optimizer takes them from there.
        self.optimizer: Any = build_optimizer(module.trainable())
        self._sources: list[int] = []
        self._slots: dict[str, Slots] = {}
        self._running: Any = None
        # Of a parameter that is stepped in a flat tensor with others, what takes it whole has a piece; and estimates
        # of the curvature come out of ZeRO as steps do.
        self._owned: OwnedOptimizer | None = None
        self._placed: dict[Tensor, list[tuple[str, slice]]] = {}
        self._num_labels: int | None = None
        if self._stage and (self.optimizer.takes_whole or hasattr(self.optimizer, "update_hessian")):
            place = torch.device("cpu") if "offload_optimizer" in section["zero_optimization"] else device
            shapes = {name: parameter.shape for name, parameter in module.trainable()}
            self._owned = OwnedOptimizer(shapes, build_optimizer, place=place, device=device)

    def loss(self, batch: Batch) -> Tensor:
        """See Strategy."""
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with torch.autocast(kind, enabled=False):  # DeepSpeed would switch it off, and say so
            loss: Tensor = self._engine()(batch, dtype)
        return loss

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """See Strategy."""
        self._engine().set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See Strategy. DeepSpeed averages over ranks, so the loss is multiplied by their number first."""
        self._engine().backward(loss * self.world_size, scale_wrt_gas=False)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """See Strategy. DeepSpeed scales when it steps; a norm that is not finite is infinite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine().optimizer
        if self._stage == 0:
            return torch.nn.utils.clip_grad_norm_([p for group in zero.param_groups for p in group["params"]], max_norm)
        zero.clip_grad = max_norm
        return combine_grad_norm_groups(zero._get_norm_groups()) if self._stage == 3 else zero.scaled_global_norm()

    def optimizer_step(self) -> None:
        """See Strategy."""
        engine = self._engine()
        for group, source in zip(engine.optimizer.param_groups, self._sources, strict=True):
            group["lr"] = self.optimizer.param_groups[source]["lr"]
        self._step_engine()

    def _step_engine(self) -> None:
        self._running.step()
        if self._stage == 3:  # a parameter without a gradient in the next step would be stepped with this one's
            self._running.optimizer.grad_partitions_flat_buffer.zero_()

    def take_estimate(self, num_labels: int) -> None:
        """See Strategy. ZeRO brings the gradients as to a step, and passes over those that are not finite."""
        finite = math.isfinite(float(self.clip_grad_norm(math.inf)))
        if self._owned:
            self._num_labels = num_labels
            self._step_engine()
            self._num_labels = None
            return
        optimizer = self._engine().optimizer
        if finite:
            optimizer.update_hessian(num_labels)
        optimizer.zero_grad(set_to_none=True)

    def _take(self, flats: list[Tensor]) -> None:
        """What DeepSpeed would have stepped; all ranks have a flat tensor of the same parameters at a time."""
        assert self._owned is not None
        parts = {
            name: Part(flat.detach()[within], flat.grad[within])
            for flat in flats
            if flat.grad is not None
            for name, within in self._placed[flat]
        }
        if self._num_labels is None:
            self._owned.step(parts, [group["lr"] for group in self.optimizer.param_groups])
        else:
            self._owned.estimate(parts, self._num_labels)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """See Strategy."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    def train_only(self, names: frozenset[str], *, keep_state: bool) -> None:
        """See Strategy. Parked state lies in host memory: this rank's part of it under stage 3."""
        if self._running is not None:
            if names == {name for name, parameter in self.module.trainable() if parameter.requires_grad}:
                return
            self._end_engine()
        for name, parameter in self.module.trainable():
            parameter.requires_grad_(name in names)
            if name not in names and not keep_state:
                self._slots.pop(name, None)
        if self._owned:
            self._owned.rest(names, keep_state=keep_state)

    def pieces(self) -> dict[str, Piece]:
        """See Strategy. Stages 1 and 2 cut what they step into ranges of a flat tensor, stage 3 every parameter."""
        whole: dict[str, Tensor] = {}
        found: dict[str, Piece] = self._owned.pieces() if self._owned else {}
        for name, parameter in self.module.trainable():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if hasattr(parameter, "ds_tensor"):  # from the first engine on
                found |= self._cut(f"model/{name}", parameter.ds_tensor.detach(), shape)
            else:
                whole[f"model/{name}"] = parameter.detach()
            if self._owned:
                continue
            partitioned = self._stage in (1, 2) and self._running is not None and parameter.requires_grad
            flat, within, piece = self._place(parameter) if partitioned else (None, slice(0), slice(0))
            live = self._running.optimizer.optimizer.state.get(flat, {}) if partitioned else {}
            for slot, value in (live if partitioned else self._slots_of(name, parameter, copied=False)).items():
                key = f"optimizer/{name}/{slot}"
                if not value.ndim:
                    if self.rank == 0:
                        found[key] = Piece(value, 0, ())
                elif self._stage == 3:
                    found |= self._cut(key, value, shape)
                elif not partitioned:
                    whole[key] = value
                elif within.stop > (within.start or 0):
                    found[key] = Piece(value[within], piece.start, tuple(parameter.shape))
        return found | share_of(whole, rank=self.rank, world_size=self.world_size)

    def _cut(self, key: str, part: Tensor, shape: torch.Size) -> dict[str, Piece]:
        """This rank's part of a parameter, or of something of its shape, without the zeros after the end."""
        start = self.rank * part.numel()
        length = min(part.numel(), shape.numel() - start)
        return {key: Piece(part.flatten()[:length], start, tuple(shape))} if length > 0 else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See Strategy. Before the first step."""
        assert self._running is None, "the engine has been made"
        restore_weights(self.module.trainable(), state)
        if self._owned:
            self._owned.load(state)
            return
        self._slots = {
            name: {slot: self._part(state[key]) if self._stage == 3 else state[key] for slot, key in slots.items()}
            for name, slots in optimizer_slots(state).items()
        }

    def _engine(self) -> Any:
        if self._running is None:
            self._start_engine()
        return self._running

    def _start_engine(self) -> None:
        deepspeed = deepspeed_on(self.device)
        groups, self._sources = self._groups_by_age()
        if self._owned:
            optimizer: Any = HandedOn(groups, self._take)
        else:
            optimizer = self._build([(name, p) for name, p in self.module.trainable() if p.requires_grad])
            optimizer.param_groups[:] = groups
        zero = {**self._config["zero_optimization"]}
        for part in ("offload_optimizer", "offload_param"):
            if part in zero:  # copies from pageable memory hold the GPU up
                zero[part] = {"pin_memory": self.device.type == "cuda", **zero[part]}
        self._running, *_ = deepspeed.initialize(
            model=Wrapped(self.module), optimizer=optimizer, config={**self._config, "zero_optimization": zero}
        )
        if self._stage == 3:
            step_in_place(self._running.optimizer)
        if self._owned:
            self._lay_out()
        for name, parameter in self.module.trainable():
            if parameter.requires_grad and name in self._slots:
                self._put(parameter, self._slots.pop(name))

    def _lay_out(self) -> None:
        """Where each parameter lies in the flat tensors, for this rank's steps and the other ranks."""
        assert self._owned is not None
        self._placed, ranges = {}, {}
        for name, parameter in self.module.trainable():
            if parameter.requires_grad:
                flat, within, piece = self._place(parameter)
                if self._stage == 3:  # without the zeros after the end
                    start = min(self.rank * (within.stop - within.start), parameter.ds_numel)
                    length = min(within.stop - within.start, parameter.ds_numel - start)
                    within, piece = slice(within.start, within.start + length), slice(start, start + length)
                self._placed.setdefault(flat, []).append((name, within))
                ranges[name] = (piece.start or 0, piece.stop - (piece.start or 0))
        self._owned.lay_out(ranges)

    def _groups_by_age(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Groups of what trains, and the group of `self.optimizer` that each is of.

        ZeRO steps a group as one flat tensor with one count of steps, so parameters of different counts are kept apart:
        a shared count would be wrong in the bias correction of some.
        """
        names = {id(parameter): name for name, parameter in self.module.trainable()}
        groups, sources = [], []
        for source, group in enumerate(self.optimizer.param_groups):
            by_age: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.requires_grad:
                    slots = self._slots.get(names[id(parameter)], {})
                    age = tuple(sorted((key, float(value)) for key, value in slots.items() if value.ndim == 0))
                    by_age.setdefault(age, []).append(parameter)
            for _, parameters in sorted(by_age.items()):
                groups.append({**group, "params": parameters})
                sources.append(source)
        return groups, sources

    def _end_engine(self) -> None:
        """Takes the optimizer state out of the engine, and everything of the engine out of the module."""
        from deepspeed.runtime.zero import parameter_offload

        engine = self._running
        for name, parameter in self.module.trainable():
            if parameter.requires_grad and not self._owned:
                self._slots[name] = self._slots_of(name, parameter)
        self._placed = {}
        engine.destroy()
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [part for part in stack if part is not engine.module]
        for part in self.module.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
                part.__dict__.pop(name, None)  # the next engine would go on with this one's
        for parameter in self.module.parameters():
            parameter.grad = None
            parameter.__dict__.pop("_z3_optimizer", None)
            own = parameter.ds_tensor if self._stage == 3 else parameter
            own.data = own.data.clone()  # a view would keep the flat tensor of all that has trained
        self._running = None
        del engine
        gc.collect()  # engines hang in cycles

    def _slots_of(self, name: str, parameter: nn.Parameter, *, copied: bool = True) -> Slots:
        """What there is for a parameter on this rank. copied: in host memory, for when the engine is gone; else, but
        for stages 1 and 2, what the engine changes."""
        if self._running is None or not parameter.requires_grad:
            return self._slots.get(name, {})
        if self._stage == 0:
            live = self._running.optimizer.state.get(parameter, {})
            return {key: value.to("cpu", copy=True) if copied else value for key, value in live.items()}
        flat, within, piece = self._place(parameter)
        slots = {}
        for key, value in self._running.optimizer.optimizer.state.get(flat, {}).items():
            if value.ndim == 0 or self._stage == 3:
                own = value[within] if value.ndim else value
                slots[key] = own.to("cpu", copy=True) if copied else own
            else:
                whole = torch.zeros(parameter.numel(), device=self.device)
                whole[piece] = value[within].to(self.device)
                dist.all_reduce(whole)
                slots[key] = whole.cpu().view(parameter.shape)
        return slots

    def _put(self, parameter: nn.Parameter, slots: Slots) -> None:
        """Gives a parameter's state to the engine's optimizer."""
        if self._stage == 0:
            self._running.optimizer.state[parameter] = {key: value.to(self.device) for key, value in slots.items()}
            return
        flat, within, piece = self._place(parameter)
        live = self._running.optimizer.optimizer.state[flat]
        for key, value in slots.items():
            if value.ndim == 0:
                live[key] = value.to(flat.device, copy=True)
            else:
                if key not in live:
                    live[key] = torch.zeros_like(flat, requires_grad=False)
                live[key][within] = (value if self._stage == 3 else value.flatten()[piece]).to(flat.device)

    def _place(self, parameter: Any) -> tuple[Tensor, slice, slice]:
        """The flat tensor in which this rank steps a parameter, where in it, and which elements of the parameter."""
        zero = self._running.optimizer
        if self._stage == 3:
            group, start, length = zero.grad_position[zero.get_param_id(parameter)]
            return zero.fp32_partitioned_groups_flat[group], slice(start, start + length), slice(0)
        group = next(i for i, found in enumerate(zero.bit16_groups) if any(p is parameter for p in found))
        flat, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:
            return flat, slice(0), slice(0)
        within, piece = mapping.hp_fragment_address, mapping.lp_fragment_address
        return (
            flat,
            slice(within.start, within.start + within.numel),
            slice(piece.start, piece.start + piece.numel),
        )

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's part, cut as DeepSpeed cuts: equal lengths, zeros after the end. Counters are everyone's."""
        if not whole.ndim:
            return whole
        length = -(-whole.numel() // self.world_size)
        part = torch.zeros(length, dtype=whole.dtype)
        found = whole.flatten()[self.rank * length : (self.rank + 1) * length]
        part[: found.numel()] = found
        return part
