"""The section `speculation`, and what vLLM is told."""

import pytest

from raylm.config import GenerateConfig, ServeConfig, load_config
from raylm.config.speculation import SPECULATION_METHODS, SpeculationSection
from raylm.errors import ConfigError


def section(**keys: object) -> SpeculationSection:
    return load_config(ServeConfig, {"model": "m", "speculation": keys}).speculation or pytest.fail("no section")


def test_without_the_section_nothing_is_speculated() -> None:
    assert ServeConfig(model="m").speculation is None
    assert GenerateConfig(model="m", prompts=("hello",)).speculation is None


def test_ngram_has_defaults_for_all_but_the_method() -> None:
    assert section(method="ngram").engine_settings(use_gpu=True) == {
        "method": "ngram",
        "num_speculative_tokens": 6,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }


@pytest.mark.parametrize(("given", "low", "high"), [({"min": 6}, 6, 6), ({"max": 1}, 1, 1), ({"max": 9}, 2, 9)])
def test_one_bound_of_the_lookup_moves_the_other(given: dict[str, int], low: int, high: int) -> None:
    settings = section(method="ngram", **{f"prompt_lookup_{end}": n for end, n in given.items()}).engine_settings(
        use_gpu=True
    )
    assert (settings["prompt_lookup_min"], settings["prompt_lookup_max"]) == (low, high)


def test_a_draft_model_is_named_as_the_engine_finds_it() -> None:
    found = section(method="draft_model", model="./draft", num_speculative_tokens=3).engine_settings(
        "/a/draft", use_gpu=True
    )
    assert found == {"method": "draft_model", "num_speculative_tokens": 3, "model": "/a/draft"}


def test_off_above_is_a_schedule_over_running_requests() -> None:
    settings = section(method="ngram", num_speculative_tokens=5, off_above=8).engine_settings(use_gpu=True)
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    tokens = build_dynamic_sd_schedule_lookup(settings["num_speculative_tokens_per_batch_size"], 64, 5)
    assert tokens[1:] == [5] * 8 + [0] * 56
    assert build_dynamic_sd_schedule_lookup(settings["num_speculative_tokens_per_batch_size"], 4, 5)[1:] == [5] * 4


def test_by_itself_guessing_stops_on_a_cpu_where_requests_fill_it() -> None:
    assert section(method="ngram").limit(use_gpu=False) == 8
    assert section(method="ngram").limit(use_gpu=True) is None
    assert section(method="ngram", off_above=3).limit(use_gpu=True) == 3
    assert section(method="ngram", off_above=None).limit(use_gpu=False) is None
    assert section(method="medusa", model="d").limit(use_gpu=False) is None  # it cannot
    schedule = section(method="ngram").engine_settings(use_gpu=False)["num_speculative_tokens_per_batch_size"]
    assert schedule == [[1, 8, 6], [9, 9, 0]]


def test_every_method_is_one_of_vllms() -> None:
    from typing import get_args

    from vllm.config.speculative import EagleModelTypes, NgramGPUTypes, SpeculativeMethod

    known = {*get_args(SpeculativeMethod), *get_args(EagleModelTypes), *get_args(NgramGPUTypes)}
    assert set(SPECULATION_METHODS) <= known


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "ngrm"}, "ngrm is not a method. Did you mean ngram"),
        ({"method": "draft_model"}, "method=draft_model needs model. Set speculation.model"),
        ({"method": "ngram", "model": "d"}, "method=ngram excludes model. .*choose one of draft_model, eagle"),
        ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 3}, "min=5 is above prompt_lookup_max=3"),
        ({"method": "eagle", "model": "d", "prompt_lookup_max": 3}, "prompt_lookup_max excludes method=eagle"),
        ({"method": "medusa", "model": "d", "off_above": 8}, "off_above excludes method=medusa"),
        ({"method": "suffix", "off_above": 8}, "off_above excludes method=suffix"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens=0 is not valid"),
        ({"method": "ngram", "num_speculative_tokens": 200}, "num_speculative_tokens=200 is not valid"),
        ({"method": "ngram", "off_abov": 3}, "Did you mean speculation.off_above"),
        ({}, "speculation.method is missing"),
    ],
)
def test_what_does_not_fit_together_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**keys)
