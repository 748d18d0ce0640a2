import sys
from typing import Any

import numpy as np
import pytest
import torch

from raylm.config.training import OptimizerSection
from raylm.errors import ConfigError
from raylm.optim.build import build_optimizer, check_optimizer, option_names
from raylm.optim.table import OPTIMIZERS


def test_adamw_follows_its_paper_written_out() -> None:
    """arXiv:1711.05101, Algorithm 2, 20 steps in float64."""
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal((4, 3)), rng.standard_normal((20, 4, 3))
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    section = OptimizerSection(learning_rate=1e-2, weight_decay=0.1, options={"betas": (0.8, 0.95), "eps": 1e-6})
    optimizer = build_optimizer([("w", weight)], section)
    expected, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step, gradient in enumerate(gradients, 1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        expected -= 1e-2 * 0.1 * expected
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        expected -= 1e-2 * (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-6)
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_do_not_decay(name: str) -> None:
    """O01."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RMSNorm(4), torch.nn.Embedding(5, 4))
    optimizer = build_optimizer(model.named_parameters(), OptimizerSection(name=name, weight_decay=0.1), head_dim=2)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "2.weight": 0.1,
    }


@pytest.mark.parametrize("name", ["adamw", "muon", "galore"])
def test_norms_and_biases_of_two_dimensions_do_not_decay_either(name: str) -> None:
    """O01: one for each head in Command R+, one for each expert in GPT-OSS."""
    shaped = {
        "model.layers.0.self_attn.q_norm.weight": False,
        "model.layers.0.mlp.experts.gate_up_proj_bias": False,
        "model.layers.0.mlp.experts.gate_up_proj": True,
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.q_proj.lora_A.default.weight": True,
        "lm_head.weight": True,
    }
    named = {name: torch.nn.Parameter(torch.ones(4, 3)) for name in shaped}
    optimizer = build_optimizer(named.items(), OptimizerSection(name=name, weight_decay=0.1))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert {name: groups[id(p)]["weight_decay"] > 0 for name, p in named.items()} == shaped
    hidden = [name for name, p in named.items() if groups[id(p)].get("hidden")]
    assert hidden == ([] if name == "adamw" else list(shaped)[2:5])


def test_embeddings_decay_unless_told_not_to() -> None:
    embeddings = ("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight")
    embeddings += (
        "bert.embeddings.word_embeddings.weight",
        "transformer.word_embeddings.weight",
        "gpt.embed_in.weight",
    )
    others = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    named = {name: torch.nn.Parameter(torch.ones(4, 3)) for name in (*embeddings, *others)}
    for decay in (True, False):
        section = OptimizerSection(weight_decay=0.1, decay_embeddings=decay)
        optimizer = build_optimizer(named.items(), section)
        found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert {name for name, p in named.items() if not found[id(p)]} == (set() if decay else set(embeddings))


def test_patterns_choose_learning_rates() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RMSNorm(4), torch.nn.Embedding(5, 4))
    section = OptimizerSection(learning_rate=1.0, weight_decay=0.1, learning_rates={"0.*as": 0.5, "0": 0.25, "2": 0.0})
    optimizer = build_optimizer(model.named_parameters(), section)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": (0.25, 0.1),
        "0.bias": (0.5, 0.0),  # the first pattern counts
        "1.weight": (1.0, 0.0),
        "2.weight": (0.0, 0.1),
    }
    assert optimizer.param_groups[0]["lr"] == 1.0
    with pytest.raises(ConfigError, match=r"no trainable parameter's name holds 'lm_hed'"):
        build_optimizer(model.named_parameters(), OptimizerSection(learning_rates={"lm_hed": 1e-3}))


def test_unknown_optimizers_and_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'adamv' is not an optimizer\. Did you mean adam"):
        check_optimizer(OptimizerSection(name="adamv"))
    with pytest.raises(ConfigError, match=r"adamw has no option beta\. Did you mean betas\?"):
        check_optimizer(OptimizerSection(options={"beta": 0.9}))
    with pytest.raises(ConfigError, match=r"adamw does not take betas=0\.9: "):
        check_optimizer(OptimizerSection(options={"betas": 0.9}))
    check_optimizer(OptimizerSection(options={"betas": [0.8, 0.9]}, learning_rates={"lm_head": 1e-3}))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("muon", {"adjust_lr_fn": "match_rms_adam"}, "adjust_lr_fn must be match_rms_adamw or original, not"),
        ("muon", {"ns_steps": 0}, "ns_steps must be a whole number from 1, not 0"),
        ("apollo", {"scale_type": "chanel"}, "scale_type must be channel or tensor, not 'chanel'"),
        ("apollo", {"rank": 0}, "rank must be a whole number from 1, not 0"),
        ("galore", {"interval_steps": 0}, "interval_steps must be a whole number from 1, not 0"),
        ("sophia", {"hessian_interval_steps": 0}, "hessian_interval_steps must be a whole number from 1, not 0"),
        *((name, {"betas": [0.9]}, "betas must be two numbers") for name in ("lamb", "sophia", "adam_mini", "muon")),
        ("lamb", {"betas": [0.9, 1.0]}, "betas must be two numbers"),
    ],
)
def test_what_an_optimizer_of_ours_cannot_be_given_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} does not take .*: {said}"):
        check_optimizer(OptimizerSection(name=name, options=options))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "raylm.optim.eight_bit", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs the package bitsandbytes\. pip install 'raylm\[quant"):
        check_optimizer(OptimizerSection(name="adamw_8bit"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_one_knows_its_options(name: str) -> None:
    check_optimizer(OptimizerSection(name=name))
    assert set(OPTIMIZERS[name].options) <= set(option_names(OPTIMIZERS[name]))
    with pytest.raises(ConfigError, match=rf"{name} has no option momentun\. (Did you mean \w+\?|Choose one of \w+)"):
        check_optimizer(OptimizerSection(name=name, options={"momentun": 0.9}))


def test_muon_takes_matrices_of_blocks_only() -> None:
    named = {
        "model.layers.0.mlp.up_proj.weight": torch.nn.Parameter(torch.ones(4, 3)),
        "model.layers.0.norm.weight": torch.nn.Parameter(torch.ones(4)),
        "base_model.model.layers.11.q_proj.lora_A.default.weight": torch.nn.Parameter(torch.ones(4, 3)),
        "transformer.h.3.mlp.c_fc.bias": torch.nn.Parameter(torch.ones(4)),
        "transformer.wte.weight": torch.nn.Parameter(torch.ones(4, 3)),
        "model.embed_tokens.weight": torch.nn.Parameter(torch.ones(4, 3)),
        "lm_head.weight": torch.nn.Parameter(torch.ones(4, 3)),
    }
    optimizer = build_optimizer(named.items(), OptimizerSection(name="muon", weight_decay=0.1))
    hidden = {id(p) for group in optimizer.param_groups if group["hidden"] for p in group["params"]}
    assert [name for name, p in named.items() if id(p) in hidden] == [
        "model.layers.0.mlp.up_proj.weight",
        "base_model.model.layers.11.q_proj.lora_A.default.weight",
    ]
    assert {group["weight_decay"] for group in optimizer.param_groups if group["hidden"]} == {0.1}
