"""What `raylm plan` says beside what happens: bytes of live tensors, allocations, steps and tokens."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raylm
from raylm.config import TrainConfig, load_config
from raylm.config.training import OptimizerSection
from raylm.errors import ConfigError, DataError, ModelError, RunDirError
from raylm.models.load import load_model
from raylm.optim.build import build_optimizer
from raylm.training.batch import batch_of
from raylm.training.loop import train_step
from raylm.training.module import LossModule
from raylm.training.planning.memory import LAYOUTS, layout_of
from raylm.training.planning.optimizer_state import state_bytes
from raylm.training.planning.plan import Plan
from raylm.training.planning.report import plan_lines
from raylm.training.prepare import load_base, prepared
from raylm.training.strategies.single import SingleStrategy
from tests.conftest import PAIRS
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 320, "max_position_embeddings": 512, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for its tensors to outweigh counters and positions."""
    return build_tiny_model(tmp_path_factory.mktemp("planned") / "model", **SIZES)


@pytest.fixture
def make_plan(model: Path, write_dataset: Any, tmp_path: Path) -> Any:
    data = write_dataset(PAIRS)

    def make(*overrides: str, **options: Any) -> Plan:
        base = {
            "model": {"path": str(model)},
            "data": {"train": str(data), "max_seq_len": 256, "loss_on": "all", "cache": False},
            "run": {"dir": str(tmp_path / "run")},
            "training": {"global_batch_size": 1, "precision": "fp32"},
        }
        return raylm.plan(base, list(overrides), tokens_per_second=100.0, **options)

    return make


def _steps(model: Path, overrides: list[str], accumulation: int) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer state, counted over the tensors, and the most that was allocated beside
    the weights, by torch's own account of allocations."""
    config = load_config(TrainConfig, {"model.path": str(model), "data.train": "unused.json"}, overrides)
    module = LossModule(prepared(load_model(config.model, CPU), config), config.loss)
    module.train()
    strategy = SingleStrategy(module, lambda named: build_optimizer(named, config.optimizer), CPU)
    batch = batch_of([np.arange(64, dtype=np.int32)] * 4, [np.ones(64, bool)] * 4)
    held = 0
    update = strategy.optimizer_step

    def counted_update() -> None:
        nonlocal held
        tensors = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
        states = [value for slots in strategy.optimizer.state.values() for value in slots.values()]
        held = sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *states])
        update()

    strategy.optimizer_step = counted_update  # type: ignore[method-assign]
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for step in range(2):
            train_step(strategy, [batch] * accumulation, max_grad_norm=1.0, precision="fp32", step=step)
    live = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return held, highest


@pytest.mark.parametrize(
    ("accumulation", "overrides"),
    [
        (1, ["training.method=full", "loss.label_smoothing=0.1", "loss.z_loss=1e-4"]),
        (2, ["training.method=full"]),
        (1, ["training.method=full", "training.gradient_checkpointing=true"]),
        (2, ["training.method=lora", "lora.rank=8"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_planned_bytes_are_those_of_a_step(
    model: Path, make_plan: Any, overrides: list[str], accumulation: int
) -> None:
    plan = make_plan(*overrides, f"training.global_batch_size={accumulation}")
    held, highest = _steps(model, overrides, accumulation)
    row = plan.chosen
    assert row.weights + row.gradients + row.optimizer == pytest.approx(held, rel=0.005)
    assert row.peak - row.weights == pytest.approx(highest, rel=0.05)


def test_bf16_keeps_products_in_half_the_bytes(make_plan: Any) -> None:
    one, other = make_plan().chosen, make_plan("training.precision=bf16").chosen
    assert one.weights == other.weights
    assert other.activations < one.activations


def test_sharing_divides_what_is_held(make_plan: Any) -> None:
    """Exactly as ZeRO defines its stages: optimizer state, gradients too, weights too."""
    rows = {row.name: row for row in make_plan("cluster.num_workers=2", "training.global_batch_size=2").memory}
    single = rows["single"]
    assert (single.workers, rows["ddp"].workers) == (1, 2)
    assert rows["ddp"].communication == 0  # gradients lie in the buckets that are exchanged
    for name in ("fsdp", "fsdp reshard_after_forward=false", "deepspeed stage=3"):
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(rows[name], part) == pytest.approx(getattr(single, part) / 2, rel=0.01)
    assert rows["deepspeed stage=1"].weights == single.weights
    assert rows["deepspeed stage=1"].optimizer == pytest.approx(single.optimizer / 2 + single.weights / 2, rel=0.01)
    assert rows["fsdp"].peak < rows["fsdp reshard_after_forward=false"].peak
    offloaded = rows["deepspeed stage=3 offload_optimizer=true offload_param=true"]
    assert offloaded.host > rows["deepspeed stage=3"].host


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_layout_is_the_one_its_settings_choose(layout: Any, tmp_path: Path) -> None:
    section = {f"{layout.strategy}.{key}": value for key, value in layout.section.items()}
    base = {"model.path": "m", "data.train": "d", "training.strategy": layout.strategy, **section}
    assert layout_of(load_config(TrainConfig, base)) is layout


def test_a_choice_that_the_table_lacks_gets_a_row(make_plan: Any) -> None:
    plan = make_plan("training.strategy=deepspeed", "deepspeed.stage=1", "deepspeed.offload_optimizer=true")
    assert plan.chosen.name == "deepspeed stage=1 offload_optimizer=true"
    assert len(plan.memory) > len([row for row in LAYOUTS if not row.section.get("cpu_offload")])
    assert make_plan("training.strategy=deepspeed", "deepspeed.stage=0").chosen.name == "deepspeed stage=0"


def test_lisa_holds_the_state_of_what_learns(make_plan: Any) -> None:
    lisa = make_plan("training.method=lisa", "lisa.num_active_layers=1")
    full = make_plan()
    block = (full.trainable_parameters - 320 * 128) / SIZES["num_hidden_layers"]
    assert lisa.trainable_parameters == full.trainable_parameters
    assert full.chosen.optimizer - lisa.chosen.optimizer == pytest.approx(2 * block * 8, rel=0.02)


@pytest.mark.slow
def test_steps_tokens_and_rates_are_the_runs(make_plan: Any, ray_cluster: Any, tmp_path: Path) -> None:
    options = ["training.global_batch_size=4", "training.num_epochs=2", "schedule.warmup_steps=3"]
    options += ["data.max_seq_len=64", "export.enabled=false", "metrics.sinks=[]"]
    plan = make_plan(*options)
    assert not (tmp_path / "run").exists()
    result = raylm.train(
        {
            "model.path": plan.model,
            "data": {"train": str(tmp_path / "data.json"), "loss_on": "all", "cache": str(tmp_path / "cache")},
            "run.dir": str(tmp_path / "real"),
        },
        [*options, "training.precision=fp32"],
    )
    lines = [json.loads(line) for line in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()]
    assert (result.steps, plan.data_source) == (plan.steps, "tokenised")
    assert plan.tokens == pytest.approx(sum(line["train/tokens"] for line in lines), rel=0.01)
    assert plan.flops_per_token * lines[0]["train/tokens"] == lines[0]["train/flops"]
    for step, rate in plan.rates:
        assert lines[step - 1]["train/learning_rate"] == pytest.approx(rate)
    cached = make_plan(*options, f"data.cache={tmp_path / 'cache'}")
    assert (cached.data_source, cached.steps, cached.tokens) == ("cache", plan.steps, plan.tokens)


def test_large_files_are_sampled(make_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in PAIRS * 400
    ]
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = make_plan(f"data.train={path}")
    monkeypatch.setattr("raylm.data.survey.SMALL_BYTES", 10**9)
    exact = make_plan(f"data.train={path}")
    assert (plan.data_source, exact.data_source) == ("sample", "tokenised")
    assert plan.sequences == pytest.approx(len(rows), rel=0.05)
    assert plan.steps == pytest.approx(exact.steps, rel=0.05)
    assert plan.tokens == pytest.approx(exact.tokens, rel=0.05)
    assert any("about" in line for line in plan_lines(plan))


def test_time_and_room(make_plan: Any) -> None:
    plan = make_plan()
    assert plan.seconds == pytest.approx(plan.tokens / 100)
    assert plan.fits
    tight = make_plan(memory_gib=0.001)
    assert not tight.fits
    assert plan_lines(tight)[-1] == "single does not fit."
    marked = [line for line in plan_lines(plan) if line.startswith("* ")]
    assert len(marked) == 1
    assert marked[0].startswith("* single")


def test_what_would_stop_a_run_stops_its_plan(make_plan: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        make_plan("data.train=absent.json")
    with pytest.raises(ModelError, match="above the 512 positions"):
        make_plan("data.max_seq_len=1024")
    with pytest.raises(ConfigError, match="is not an optimizer"):
        make_plan("optimizer.name=adamv")
    with pytest.raises(ConfigError, match="memory_gib"):
        make_plan(memory_gib=-1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").touch()
    with pytest.raises(RunDirError, match="something else"):
        make_plan()


def test_plans_leave_out_what_an_optimizer_is_refused_with(make_plan: Any) -> None:
    free = ["optimizer.name=schedulefree_adamw", "schedule.name=constant"]
    plan = make_plan(*free, memory_gib=8.0)
    assert {row.name.split()[0] for row in plan.memory} == {"single", "ddp", "fsdp"}
    with pytest.raises(ConfigError, match=r"schedulefree_adamw excludes training\.strategy=deepspeed"):
        make_plan(*free, "training.strategy=deepspeed")


def test_state_that_one_rank_owns_is_planned_by_owner(make_plan: Any) -> None:
    """Muon keeps one number for a matrix of a block, two elsewhere; whole tensors go to ranks."""
    rows = {row.name: row for row in make_plan("optimizer.name=muon", "cluster.num_workers=2", *BATCH).memory}
    adamw = make_plan(*BATCH).chosen.optimizer
    single = rows["single"].optimizer
    assert adamw / 2 < single < adamw
    assert single / 2 <= rows["fsdp"].optimizer < 0.75 * single
    assert rows["deepspeed stage=3"].optimizer == rows["fsdp"].optimizer


BATCH = ("training.global_batch_size=2",)


def test_the_state_of_an_optimizer_by_shape() -> None:
    assert state_bytes(OptimizerSection(), [(30, 20), (30,)]) == 2 * 4 * 630 + 2 * 4


def test_quantised_weights_and_averages_are_counted(model: Path, make_plan: Any) -> None:
    """The bytes that bitsandbytes keeps for the weights: packed elements, scales of blocks, scales of those."""
    pytest.importorskip("bitsandbytes")
    config = load_config(TrainConfig, {"model.path": str(model), "data.train": "x"}, ["training.method=qlora"])
    held = 0
    for parameter in prepared(load_base(config, CPU, "fp32"), config).parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    quantised = make_plan("training.method=qlora")
    assert quantised.chosen.weights == pytest.approx(held, rel=0.02)
    assert not any(row.name.startswith("deepspeed") for row in quantised.memory)
    plain, averaged = make_plan().chosen, make_plan("training.ema_decay=0.9").chosen
    assert averaged.optimizer - plain.optimizer == plain.weights
