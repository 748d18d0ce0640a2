"""Speculative decoding answers what the model alone would answer (known faults W10 and W11).

Real engines in float32 over tiny models: the same tokens at temperature 0 with every feature of a request, the same
distribution at temperature 1, against engines without speculation and against transformers.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from raylm.config.speculation import SpeculationSection
from raylm.models.drafts import engine_options
from tests.tiny import build_tiny_model

PROGRAM = Path(__file__).with_name("engines.py")
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 3}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "off_above": 12}
RUNNING = 16
"""Requests that an engine of these tests runs at once: more than NGRAM speculates for."""


def run_engines(jobs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Answers of engines.py, by the name of the job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder / "jobs.json"), str(folder / "answers.json")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((folder / "answers.json").read_text())
    for name, answer in answers.items():
        assert "error" not in answer, (name, answer["error"])
    return {name: answer["rounds"] for name, answer in answers.items()}


def engine(model: Path, speculation: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Arguments of vLLM for a model and the section `speculation`, as raylm passes them."""
    arguments: dict[str, Any] = {"model": str(model), "max_num_seqs": RUNNING, **options}
    section = SpeculationSection.model_validate(speculation) if speculation is not None else None
    return arguments | engine_options(section, str(model), use_gpu=False)


def prompts(count: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    """Token ids with repetitions, which n-grams find, of many lengths."""
    draw = random.Random(seed)
    pieces = [[draw.randrange(3, vocabulary) for _ in range(draw.randint(3, 9))] for _ in range(count)]
    return [(piece * 8)[: draw.randint(10, 40)] for piece in pieces]


def near(model: Path, folder: Path, *, noise: float, seed: int = 0, **settings: Any) -> Path:
    """A draft that often agrees with the model: its weights and a little noise."""
    from transformers import AutoModelForCausalLM

    build_tiny_model(folder, hidden_size=128, **settings)
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    draft = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for ours, theirs in zip(draft.parameters(), source.parameters(), strict=True):
            ours[: len(theirs)] = theirs + noise * theirs.std().nan_to_num() * torch.randn_like(theirs)
    draft.save_pretrained(folder)
    return folder


def assert_same(rounds: list[Any], expected: list[Any]) -> None:
    """Every round has the tokens of the engine without speculation, and log-probabilities close to its."""
    for number, (found, plain) in enumerate(zip(rounds, expected, strict=True)):
        assert "error" not in found, (number, found)
        assert found["ids"] == plain["ids"], number
        for ours, theirs in zip(found["logprobs"], plain["logprobs"], strict=True):
            if theirs is not None:
                for place, reference in zip(ours, theirs, strict=True):
                    assert place == pytest.approx(reference, abs=1e-4), number


FEATURES: dict[str, dict[str, Any]] = {
    "logprobs": {**GREEDY, "logprobs": 5},
    "penalties": {**GREEDY, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    "schema": {"max_tokens": 48, "temperature": 0, "structured_outputs": {"json": SCHEMA}},
    "words": {**GREEDY, "min_tokens": 8, "bad_words": ["hello"], "allowed_token_ids": list(range(3, 200))},
    "stops": {"max_tokens": 24, "temperature": 0, "stop_token_ids": list(range(20, 60)), "min_tokens": 3},
}
"""What a request may ask for, each answered by every engine."""
REFUSED: dict[str, dict[str, Any]] = {
    "min_p": {"max_tokens": 8, "temperature": 1, "min_p": 0.1},
    "logit_bias": {"max_tokens": 8, "temperature": 0, "logit_bias": {"5": 3.0}},
}


@pytest.fixture(scope="module")
def target(served_model_dir: Path) -> Path:
    return served_model_dir


@pytest.fixture(scope="module")
def vocabulary(target: Path) -> int:
    return int(json.loads((target / "config.json").read_text())["vocab_size"])


@pytest.fixture(scope="module")
def answers(target: Path, vocabulary: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same requests to an engine without speculation, one with n-grams and one with a draft model."""
    folder = tmp_path_factory.mktemp("speculation")
    draft = near(target, folder / "draft", noise=0.05)
    few, many = prompts(12, vocabulary), prompts(48, vocabulary, seed=1)
    rounds = [{"prompts": few, "sampling": GREEDY}, {"prompts": many, "sampling": GREEDY}]
    rounds += [{"prompts": few[:8], "sampling": sampling} for sampling in FEATURES.values()]
    refused = [{"prompts": few[:1], "sampling": sampling} for sampling in REFUSED.values()]
    jobs = [{"name": "none", "engine": engine(target), "rounds": rounds}]
    drafted = {"method": "draft_model", "model": str(draft), "off_above": 12}
    for name, speculation in {"ngram": NGRAM, "draft": drafted}.items():
        jobs.append({"name": name, "engine": engine(target, speculation), "rounds": rounds + refused})
    return run_engines(jobs, folder)


SPECULATED = ("ngram", "draft")


@pytest.mark.parametrize("name", SPECULATED)
def test_greedy_answers_are_those_without_speculation(answers: dict[str, Any], name: str) -> None:
    """W10: with log-probabilities, penalties, a JSON schema, forbidden words and stops too."""
    expected = answers["none"]
    assert_same(answers[name][: len(expected)], expected)
    for text in ("draft_tokens", "accepted_tokens"):
        assert answers[name][0]["counters"][text] > 0
    assert answers[name][0]["counters"]["accepted_tokens"] < answers[name][0]["counters"]["draft_tokens"]


def test_log_probabilities_are_those_of_transformers(answers: dict[str, Any], target: Path, vocabulary: int) -> None:
    """W10, against a reference that is no vLLM."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    asked = prompts(12, vocabulary)[:8]
    for name in SPECULATED:
        found = answers[name][2]
        for prompt, ids, logprobs in zip(asked, found["ids"], found["logprobs"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            reference = logits.log_softmax(-1)
            assert reference.argmax(-1).tolist() == ids
            for place, expected in zip(logprobs, reference, strict=True):
                assert len(place) == 5
                for token, logprob in place.items():
                    assert logprob == pytest.approx(expected[int(token)].item(), abs=1e-3)


@pytest.mark.parametrize("name", SPECULATED)
def test_nothing_is_guessed_above_the_limit(answers: dict[str, Any], name: str) -> None:
    """12 requests at a time are speculated for; of 48, with 16 at a time, only those that are left at the end."""
    few, many = answers[name][0]["counters"], answers[name][1]["counters"]
    assert few["drafts"] > 50
    assert many["drafts"] < few["drafts"] / 2 if name == "ngram" else many["drafts"] < few["drafts"]


@pytest.mark.parametrize("name", SPECULATED)
def test_what_vllm_cannot_speculate_with_is_refused_not_ignored(answers: dict[str, Any], name: str) -> None:
    """W10: docs/speculative-decoding.md lists them."""
    for found in answers[name][-len(REFUSED) :]:
        assert "not yet supported with speculative decoding" in found["error"]


def write_head(target: Path, folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> str:
    """A head as its authors publish them: weights under their own names, and a configuration."""
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {**json.loads((target / "config.json").read_text()), "num_hidden_layers": 1, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def eagle_head(target: Path, folder: Path) -> str:
    """One random decoder layer over the target's hidden states."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(target)
    config.num_hidden_layers = 1
    torch.manual_seed(3)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    kept = {name.removeprefix("model."): tensor.clone() for name, tensor in state.items() if ".layers." in name}
    del kept["layers.0.input_layernorm.weight"]
    kept["fc.weight"] = torch.randn(config.hidden_size, 2 * config.hidden_size) * 0.1
    return write_head(target, folder, kept)


def eagle3_head(target: Path, folder: Path) -> str:
    """A random decoder layer over hidden states of three layers, with an output layer of its own."""
    config = json.loads((target / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "fc": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj": (hidden, 2 * hidden),
        "midlayer.self_attn.k_proj": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, hidden),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (config["vocab_size"], hidden),
    }
    torch.manual_seed(4)
    weights = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    for norm in ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"):
        weights[f"{norm}.weight"] = torch.ones(hidden)
    own = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["vocab_size"]}
    return write_head(target, folder, weights, **own, tie_word_embeddings=False)


def medusa_heads(target: Path, folder: Path) -> str:
    """A random block and output layer for each of three places ahead."""
    config = json.loads((target / "config.json").read_text())
    hidden, rows = config["hidden_size"], config["vocab_size"]
    torch.manual_seed(5)
    weights = {}
    for head in range(3):
        weights[f"blocks.{head}.layers.0.weight"] = torch.randn(hidden, hidden) * 0.1
        weights[f"blocks.{head}.layers.0.bias"] = torch.zeros(hidden)
        weights[f"lm_heads.{head}.weight"] = torch.randn(rows, hidden) * 0.1
    own = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": 3, "truncated_vocab_size": rows}
    return write_head(target, folder, weights, **own)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # eight engines
def test_every_method_gives_the_same_200_answers(target: Path, vocabulary: int, tmp_path: Path) -> None:
    """W10 and W11: n-grams, draft models with the same and with padded rows, EAGLE, EAGLE-3 and Medusa."""
    rounds = [{"prompts": prompts(200, vocabulary, seed=2), "sampling": {**GREEDY, "max_tokens": 32}}]
    rounds += [{"prompts": prompts(8, vocabulary, seed=3), "sampling": sampling} for sampling in FEATURES.values()]
    draft, padded = (
        near(target, tmp_path / "draft", noise=0.05),
        near(target, tmp_path / "padded", noise=0.05, vocab_size=352),
    )
    speculations: dict[str, Any] = {
        "none": None,
        "ngram": {**NGRAM, "off_above": None},
        "draft": {"method": "draft_model", "model": str(draft), "off_above": None},
        "padded": {"method": "draft_model", "model": str(padded), "off_above": None},
        "eagle": {"method": "eagle", "model": eagle_head(target, tmp_path / "eagle"), "off_above": 12},
        "medusa": {"method": "medusa", "model": medusa_heads(target, tmp_path / "medusa")},
    }
    jobs = [
        {"name": name, "engine": engine(target, speculation, max_num_seqs=200), "rounds": rounds}
        for name, speculation in speculations.items()
    ]
    # vLLM takes layers 2, n // 2 and n - 3, which are three from n = 7 on.
    deep = build_tiny_model(tmp_path / "deep", hidden_size=128, num_hidden_layers=8)
    eagle3 = {"method": "eagle3", "model": eagle3_head(deep, tmp_path / "eagle3"), "off_above": None}
    jobs += [
        {"name": name, "engine": engine(deep, speculation, max_num_seqs=200), "rounds": rounds}
        for name, speculation in {"deep": None, "eagle3": eagle3}.items()
    ]
    answers = run_engines(jobs, tmp_path / "run")
    for name in (*speculations, "eagle3"):
        assert_same(answers[name], answers["deep" if name == "eagle3" else "none"])
        if name != "none":
            assert sum(found["counters"]["draft_tokens"] for found in answers[name]) > 100, name
    for name in ("ngram", "draft", "padded"):
        assert answers[name][0]["counters"]["accepted_tokens"] > 500, name


@pytest.mark.slow
def test_an_adapter_on_the_target_keeps_its_answers(target: Path, vocabulary: int, tmp_path: Path) -> None:
    """W11: the draft proposes without the adapter, and the answers are those of the adapted model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(6)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    draft = near(target, tmp_path / "draft", noise=0.05)
    asked = prompts(24, vocabulary, seed=4)
    rounds = [{"prompts": asked, "sampling": GREEDY, "adapter": name} for name in (None, str(tmp_path / "adapter"))]
    drafted = {"method": "draft_model", "model": str(draft), "off_above": None}
    kinds = {"none": None, "ngram": NGRAM, "draft": drafted}
    jobs = [
        {"name": name, "engine": engine(target, kind, enable_lora=True, max_lora_rank=8), "rounds": rounds}
        for name, kind in kinds.items()
    ]
    answers = run_engines(jobs, tmp_path / "run")
    assert answers["none"][0]["ids"] != answers["none"][1]["ids"]
    for name in kinds:
        assert_same(answers[name], answers["none"])
    assert answers["draft"][1]["counters"]["draft_tokens"] > 0


@pytest.mark.slow
def test_an_extended_target_is_drafted_for_by_its_base(target: Path, vocabulary: int, tmp_path: Path) -> None:
    """W11: the target has rows that the draft lacks, and answers with them too."""
    import raylm

    extended = tmp_path / "extended"
    raylm.extend_vocabulary({"model": str(target), "output": str(extended), "special": ["<|act|>", "<|obs|>"]})
    draft = near(target, tmp_path / "draft", noise=0.05)
    new = [vocabulary, vocabulary + 1]
    asked = [[*prompt, *new, *prompt[:4]] for prompt in prompts(24, vocabulary, seed=5)]
    biased = {**GREEDY, "allowed_token_ids": [5, 6, 7, *new]}
    rounds = [{"prompts": asked, "sampling": sampling} for sampling in (GREEDY, biased)]
    kinds = {"none": None, "draft": {"method": "draft_model", "model": str(draft), "off_above": None}}
    jobs = [{"name": name, "engine": engine(extended, kind), "rounds": rounds} for name, kind in kinds.items()]
    answers = run_engines(jobs, tmp_path / "run")
    assert any(token in new for ids in answers["none"][1]["ids"] for token in ids)
    assert_same(answers["draft"], answers["none"])
    assert answers["draft"][0]["counters"]["accepted_tokens"] > 100


def sequence_probabilities(model: Path, prompt: list[int], *, vocabulary: int, length: int) -> torch.Tensor:
    """(vocabulary ** length,) float64: the exact probability of every continuation, by transformers."""
    from transformers import AutoModelForCausalLM

    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    ids = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], dim=1)
    with torch.no_grad():
        logprobs = loaded(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    probabilities = logprobs.gather(2, every[..., None]).squeeze(-1).sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
    return probabilities


def p_value(ids: list[list[int]], probabilities: torch.Tensor, vocabulary: int) -> float:
    """Of Pearson's chi-square, with the cells that expect fewer than 5 as one."""
    counts = Counter(sum(token * vocabulary**place for place, token in enumerate(reversed(found))) for found in ids)
    observed = torch.tensor([counts[cell] for cell in range(len(probabilities))], dtype=torch.float64)
    expected = probabilities * len(ids)
    rare = expected < 5
    observed, expected = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-12)).sum()
    degrees = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


@pytest.mark.slow
def test_sampled_answers_have_the_models_distribution(tmp_path: Path) -> None:
    """Four tokens of a vocabulary of five: all 625 continuations, against their exact probabilities."""
    words, length, draws = 5, 4, 20_000
    tiny = {"hidden_size": 128, "vocab_size": words, "eos_token_id": None, "initializer_range": 0.2}
    target, draft = build_tiny_model(tmp_path / "target", **tiny), near_words(tmp_path, tiny)
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    exact, other = (sequence_probabilities(m, prompt, vocabulary=words, length=length) for m in (target, draft))
    sampling = {"max_tokens": length, "temperature": 1, "ignore_eos": True, "detokenize": False}
    rounds = [{"prompts": [prompt] * draws, "sampling": sampling}]
    kinds: dict[str, Any] = {
        "none": None,
        "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "off_above": None},
        "draft": {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3, "off_above": None},
    }
    options = {"max_num_seqs": 512, "skip_tokenizer_init": True, "seed": 7}
    jobs = [{"name": name, "engine": engine(target, kind, **options), "rounds": rounds} for name, kind in kinds.items()]
    answers = run_engines(jobs, tmp_path / "run")
    for name in kinds:
        [found] = answers[name]
        assert "error" not in found, found
        assert p_value(found["ids"], exact, words) > 1e-3, name
        assert p_value(found["ids"], other, words) < 1e-9, name  # the test does tell distributions apart
        if name != "none":
            assert 0.02 < found["counters"]["accepted_tokens"] / found["counters"]["draft_tokens"] < 0.98, name


def near_words(folder: Path, settings: dict[str, Any]) -> Path:
    """A draft of the same vocabulary that often disagrees."""
    from transformers import AutoModelForCausalLM

    draft = build_tiny_model(folder / "draft", **settings)
    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    model.save_pretrained(draft)
    return draft
