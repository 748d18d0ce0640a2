"""Every row of the table against its update rule written out, and what plans, LISA and resuming rely on."""

from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.training import OptimizerSection
from raylm.optim.build import build_optimizer, is_hidden
from raylm.optim.table import OPTIMIZERS
from raylm.training.planning.optimizer_state import state_bytes
from raylm.training.state import collect_state, restore_state
from raylm.training.strategies.base import rest_optimizer
from tests.optim import rules, rules_small_state

RULES = rules.RULES | rules_small_state.RULES

STEPS, DECAY = 20, 0.1
RNG = np.random.default_rng(7)
START = {"layers.0.weight": RNG.standard_normal((4, 3)), "norm.weight": RNG.standard_normal(5)}
GRADIENTS = {name: RNG.standard_normal((STEPS, *value.shape)) for name, value in START.items()}
# NAdam's product of momenta is float32; projections add 1e-8 to the lengths they divide by.
# SOAP refines bases, and bitsandbytes does everything, in float32.
TOLERANCES = {"nadam": 1e-6, "adamp": 1e-7, "sgdp": 1e-7, "soap": 1e-5}
TOLERANCES |= {name: 1e-5 for name, row in OPTIMIZERS.items() if row.state_bits == 8}
RATES = [1e-2 * (1 - step / (2 * STEPS)) for step in range(STEPS)]
CASES = [
    *((name, {}) for name in OPTIMIZERS),
    ("ademamix", {"t_alpha_beta3": 12.0, "betas": (0.8, 0.9, 0.99)}),
    ("adamp", {"delta": 0.9}),
    ("sgdp", {"delta": 0.9}),
    ("sophia", {"hessian_interval_steps": 3, "gamma": 0.5}),
    ("radam", {"betas": (0.9, 0.8)}),
    ("adabound", {"gamma": 0.5, "final_lr": 0.02}),
    ("soap", {"precondition_frequency": 3}),
    ("soap", {"max_precondition_dim": 3}),
    ("galore", {"rank": 2, "interval_steps": 7}),
    ("apollo", {"rank": 2, "interval_steps": 7}),
    ("apollo", {"rank": 1, "scale_type": "tensor", "scale": 11.3, "max_growth": 9.0}),
]


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if OPTIMIZERS[name].state_bits == 8 else torch.float64


def _named(dtype: torch.dtype = torch.float64) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.tensor(value, dtype=dtype))) for name, value in START.items()]


def _section(name: str, options: dict[str, Any] | None = None) -> OptimizerSection:
    return OptimizerSection(name=name, learning_rate=RATES[0], weight_decay=DECAY, options=options or {})


def _step(optimizer: Any, named: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATES[step]
    for name, parameter in named:
        parameter.grad = torch.tensor(GRADIENTS[name][step], dtype=parameter.dtype) if parameter.requires_grad else None
    every = getattr(optimizer, "hessian_interval_steps", 0)
    if every and step % every == 0:  # what the loop does, with gradients of drawn labels
        optimizer.update_hessian(50)
    optimizer.step()


def _expected(name: str, parameter: str, options: dict[str, Any]) -> list[np.ndarray]:
    matrix = START[parameter].ndim == 2
    rule = RULES["adamw" if OPTIMIZERS[name].hidden_apart and not matrix else name]
    held = {**OPTIMIZERS[name].options, **options}
    if rule is RULES["adamw"]:
        held = {key: held[key] for key in ("betas", "eps")}
    held = {key: value for key, value in held.items() if key not in ("fused", "foreach")}
    return list(rule(START[parameter], GRADIENTS[parameter], RATES, DECAY if matrix else 0.0, **held))


def test_every_row_has_a_rule() -> None:
    assert RULES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_it_takes_the_steps_of_its_rule(name: str, options: dict[str, Any]) -> None:
    """20 steps in float64 with a falling rate; matrices decay, vectors do not."""
    named = _named(_dtype(name))
    optimizer = build_optimizer(named, _section(name, options))
    expected = {parameter: _expected(name, parameter, options) for parameter in START}
    for step in range(STEPS):
        _step(optimizer, named, step)
        for key, parameter in named:
            found, wanted = parameter.detach().numpy(), expected[key][step]
            if name == "muon" and parameter.ndim == 2:  # bfloat16 inside, where the processor has it
                moved = np.linalg.norm(wanted - START[key])
                assert np.linalg.norm(found - wanted) < 0.02 * moved
            else:
                close = TOLERANCES.get(name, 1e-9)
                np.testing.assert_allclose(found, wanted, rtol=close, atol=close / 100)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_eight_bits_are_those_of_dynamic_quantisation(name: str) -> None:
    """20 steps of 90 x 50 weights, the last block short, between fp32 and what the paper's quantisation leaves."""
    rng = np.random.default_rng(5)
    start = rng.standard_normal((90, 50)).astype(np.float32)
    gradients = (rng.choice([-1, 1], (90, 50)) + rng.uniform(-1.5, 1.5, (STEPS, 90, 50))).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = build_optimizer([("w", weight)], _section(name))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        weight.grad = torch.tensor(gradients[step])
        optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    options = OPTIMIZERS[name].options
    exact = list(RULES[name](start, gradients, RATES, DECAY, **{**options, "min_8bit_size": 10**9}))[-1]
    expected = list(RULES[name](start, gradients, RATES, DECAY, **options))[-1]
    found = weight.detach().numpy()
    # bitsandbytes' CPU kernel looks codes up, and takes a neighbour now and then.
    assert np.abs(found - expected).mean() < 0.1 * np.abs(found - exact).mean()


def test_adam_mini_takes_heads_of_queries_and_keys() -> None:
    names = ["layers.0.self_attn.q_proj.weight", "layers.0.self_attn.v_proj.weight"]
    named = [(name, torch.nn.Parameter(torch.tensor(START["layers.0.weight"]))) for name in names]
    optimizer = build_optimizer(named, _section("adam_mini"), head_dim=2)
    gradients = GRADIENTS["layers.0.weight"]
    options = OPTIMIZERS["adam_mini"].options
    expected = [
        list(RULES["adam_mini"](START["layers.0.weight"], gradients, RATES, DECAY, **options, block_rows=rows))
        for rows in (2, 1)
    ]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for _, parameter in named:
            parameter.grad = torch.tensor(gradients[step])
        optimizer.step()
        for (_, parameter), wanted in zip(named, expected, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), wanted[step], rtol=1e-9)
    assert not np.allclose(expected[0][-1], expected[1][-1])


@pytest.mark.parametrize(
    ("name", "options"),
    [("adam_mini", {}), *((name, {"rank": 2, "interval_steps": 7}) for name in ("galore", "apollo")), ("muon", {})],
)
@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 6, 4)])
def test_each_expert_steps_as_a_matrix_of_its_own(
    name: str, options: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixture-of-experts models have (experts, rows, columns); a plan counts their state."""
    monkeypatch.setattr("raylm.optim.muon._has_bfloat16", lambda: False)  # sums in other orders differ more in it
    rng = np.random.default_rng(3)
    start, gradients = rng.standard_normal(shape), rng.standard_normal((STEPS, *shape))
    whole = [("layers.0.mlp.experts.down_proj", torch.nn.Parameter(torch.tensor(start)))]
    alone = [
        (f"layers.0.mlp.experts.{place}.weight", torch.nn.Parameter(torch.tensor(part)))
        for place, part in enumerate(start)
    ]
    stacked, apart = build_optimizer(whole, _section(name, options)), build_optimizer(alone, _section(name, options))
    for step in range(STEPS):
        for optimizer in (stacked, apart):
            for group in optimizer.param_groups:
                group["lr"] = RATES[step]
        whole[0][1].grad = torch.tensor(gradients[step])
        for (_, parameter), gradient in zip(alone, gradients[step], strict=True):
            parameter.grad = torch.tensor(gradient)
        stacked.step()
        apart.step()
    for (_, parameter), found in zip(alone, whole[0][1].detach(), strict=True):
        np.testing.assert_allclose(found, parameter.detach(), rtol=1e-9)
    planned = state_bytes(_section(name, options), [shape], names=[whole[0][0]])
    held = sum(value.nbytes for value in stacked.state[whole[0][1]].values() if isinstance(value, torch.Tensor))
    assert abs(2 * planned - held) <= 100  # a plan is of fp32, but for the count


def test_kernels_of_convolutions_are_no_matrices_of_experts() -> None:
    assert is_hidden("layers.0.mlp.experts.gate_up_proj", 3)
    assert is_hidden("layers.0.block_sparse_moe.input_linear.weight", 3)
    assert not is_hidden("layers.0.linear_attn.conv1d.weight", 3)


def test_lamb_takes_the_same_steps_together_as_on_a_gpu() -> None:
    named, together = _named(), _named()
    plain, foreach = build_optimizer(named, _section("lamb")), build_optimizer(together, _section("lamb"))
    foreach._update_one = lambda group, parameter, gradient: foreach._update(group, [parameter])
    for step in range(STEPS):
        _step(plain, named, step)
        _step(foreach, together, step)
    for (_, left), (_, right) in zip(named, together, strict=True):
        np.testing.assert_allclose(left.detach(), right.detach(), rtol=1e-12)


@pytest.mark.parametrize("name", ["adamp", "sgdp"])
def test_projections_happen_and_do_not(name: str) -> None:
    """The cases above are of both kinds."""
    usual, never = (
        _expected(name, "layers.0.weight", {"delta": 0.9}),
        _expected(name, "layers.0.weight", {"delta": 0.0}),
    )
    always = _expected(name, "layers.0.weight", {"delta": 9.0})
    assert not np.allclose(usual[-1], never[-1])
    assert not np.allclose(usual[-1], always[-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_takes_the_bytes_of_its_row(name: str) -> None:
    """With what the scales of 8-bit state take; the count is not in the row."""
    row, (rows, columns) = OPTIMIZERS[name], (300, 200)
    found = state_bytes(_section(name), [(rows, columns)], names=["layers.0.weight"])
    expected = row.state_full * rows * columns * row.state_bits / 8
    expected += 4 * (row.state_vectors * (rows + columns) + row.state_rows * rows)
    expected += 4 * row.state_squares * (rows**2 + columns**2)
    if row.state_low_rank:
        expected += 4 * row.options["rank"] * (row.state_low_rank * rows + columns)
    if row.state_bits == 8:
        expected += row.state_full * 4 * -(-rows * columns // 256)
    assert 0 <= found - expected <= 24


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plan_counts_what_there_is(name: str) -> None:
    """An embedding longer than SOAP's limit, a matrix, one that is smaller than a rank, a vector."""
    shapes = {"embed.weight": (10_001, 4), "layers.0.w.weight": (150, 140), "layers.0.v.weight": (9, 70), "norm": (12,)}
    named = [(key, torch.nn.Parameter(torch.rand(shape))) for key, shape in shapes.items()]
    optimizer = build_optimizer(named, _section(name))
    for _, parameter in named:
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    held = 0
    for _, parameter in named:
        for key, value in optimizer.state[parameter].items():
            held += value.nbytes if isinstance(value, torch.Tensor) and not key.startswith("qmap") else 0
    planned = state_bytes(_section(name), list(shapes.values()), names=list(shapes))
    assert abs(planned - held) <= 100


def test_muon_keeps_adamws_state_for_embeddings() -> None:
    shapes, names = [(30, 20), (50, 20), (20,)], ["layers.0.mlp.weight", "embed_tokens.weight", "norm.weight"]
    assert state_bytes(_section("muon"), shapes, names=names) == 4 * 600 + (2 * 4 * 1000 + 4) + (2 * 4 * 20 + 4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(name: str) -> None:
    straight, before = _named(torch.float32), _named(torch.float32)
    first, second = build_optimizer(straight, _section(name)), build_optimizer(before, _section(name))
    for step in range(STEPS):
        _step(first, straight, step)
    for step in range(STEPS // 2):
        _step(second, before, step)
    state = {key: value.clone() for key, value in collect_state(before, second).items()}
    after = _named(torch.float32)
    third = build_optimizer(after, _section(name))
    restore_state(after, third, state)
    for step in range(STEPS // 2, STEPS):
        _step(third, after, step)
    left, right = collect_state(straight, first), collect_state(after, third)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.averages])
def test_a_parameter_that_rested_without_state_begins_anew(name: str) -> None:
    """LISA: what was frozen and freed steps as one that never stepped, whatever the others' count."""
    named = _named(_dtype(name))
    optimizer = build_optimizer(named, _section(name))
    matrix, vector = named[0][1], named[1][1]
    for step in range(5):
        _step(optimizer, named, step)
    matrix.requires_grad_(False)
    rest_optimizer(optimizer, named, keep_state=False)
    assert matrix not in optimizer.state
    rested = matrix.detach().clone()
    for step in range(5, 8):
        _step(optimizer, named, step)
    assert torch.equal(matrix, rested)
    matrix.requires_grad_(True)
    rest_optimizer(optimizer, named, keep_state=False)
    anew = [("layers.0.weight", torch.nn.Parameter(rested.clone()))]
    alone = build_optimizer(anew, _section(name))
    for step in range(8, STEPS):
        _step(optimizer, named, step)
        _step(alone, anew, step)
        assert torch.equal(matrix, anew[0][1])
    # The other one went on as if nothing had happened.
    expected = _expected(name, "norm.weight", {})[-1]
    np.testing.assert_allclose(vector.detach().numpy(), expected, rtol=TOLERANCES.get(name, 1e-9))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_zero_keeps_a_parameter(name: str) -> None:
    named = _named(_dtype(name))
    section = _section(name).model_copy(update={"learning_rates": {"norm": 0.0}})
    optimizer = build_optimizer(named, section)
    for step in range(3):
        for key, parameter in named:
            parameter.grad = torch.tensor(GRADIENTS[key][step], dtype=parameter.dtype)
        optimizer.step()
    np.testing.assert_array_equal(named[1][1].detach().numpy(), _named(_dtype(name))[1][1].detach().numpy())
    assert not np.allclose(named[0][1].detach().numpy(), START["layers.0.weight"])
