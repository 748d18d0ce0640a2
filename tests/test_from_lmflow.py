"""docs/from-lmflow.md: nothing of LMFlow's README is missing, and what stands beside it is valid."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from raylm.cli import parse
from raylm.config import GenerateConfig, ServeConfig, TrainConfig, load_config
from raylm.data.templates import PRESETS
from raylm.errors import ConfigError
from raylm.optim.table import OPTIMIZERS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from-lmflow.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "|---" not in line]
MODEL = {"model": {"path": "m"}, "data": {"train": "d"}}

# What LMFlow's README (v1, March 2025) has: scripts, options, and the rows of its two tables.
SCRIPTS = [
    "run_finetune.sh",
    "run_finetune_with_lisa.sh",
    "run_finetune_with_lora.sh",
    "run_finetune_with_custom_optim.sh",
    "run_merge_lora.sh",
    "run_chatbot.sh",
    "run_vllm_inference.sh",
    "chatbot_gradio.py",
    "run_benchmark.sh",
    "run_vis_chatbot_gradio_minigpt4.sh",
    "speculative_decoding",
    "vocab_extension",
    "download.sh",
    "ds_config_zero3.json",
    "ds_config_chatbot.json",
]
OPTIONS = [
    "--model_name_or_path",
    "--dataset_path",
    "--output_model_path",
    "--conversation_template",
    "--lisa_activated_layers",
    "--lisa_interval_steps",
    "--lisa_step_interval",
    "--use_lisa",
    "--output_lora_path",
    "--lora_model_path",
    "--output_dir",
    "--deepspeed",
    "--prompt_structure",
    "--end_string",
    "--max_new_tokens",
    "--report_to",
    "--gradient_checkpointing",
    "WANDB_MODE",
]
TEMPLATES = [
    "deepseek",
    "deepseek_v2",
    "deepseek_r1",
    "deepseek_r1_distill",
    "deepseek_v3",
    "gemma",
    "hymba",
    "internlm2",
    "llama2",
    "llama3",
    "llama3_for_tool",
    "phi3",
    "qwen2",
    "qwen2_for_tool",
    "qwen2_5",
    "qwen2_5_1m",
    "qwen2_5_math",
    "qwen_qwq",
    "yi",
    "yi1_5",
    "zephyr",
    "chatml",
]
TOPICS = ["LISA", "LoRA", "Flash", "ZeRO-3", "llama.cpp", "vLLM", "RAFT", "DPO", "multimodal", "Sophia", "SGDP"]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip()]


def settings() -> list[str]:
    """`a.b=c` of the tables, in the column of raylm; a value in capitals stands for one of the reader's."""
    found = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+=[^`]*)`", "\n".join(row.split("|", 2)[2] for row in ROWS))
    return [item for item in found if not item.partition("=")[2].isupper()]


@pytest.mark.parametrize("word", [*SCRIPTS, *OPTIONS, *TOPICS])
def test_what_lmflow_has_is_on_the_page(word: str) -> None:
    left = "\n".join(row.split("|")[1] + (row.split("|")[3] if row.count("|") > 3 else "") for row in ROWS)
    assert word.lower() in left.lower()


def test_every_template_of_lmflow_is_a_preset() -> None:
    assert all(f"`{name}`" in PAGE for name in TEMPLATES)
    assert set(TEMPLATES) <= set(PRESETS)


def test_every_optimizer_of_lmflow_is_a_row_of_the_table() -> None:
    rows = PAGE.split("| LMFlow | `optimizer.name`")[-1].split("\n\n")[0].splitlines()[2:]
    names = re.findall(r"`(\w+)`", "\n".join(rows))
    assert len(names) == 23  # as many as LMFlow's README lists
    assert set(names) <= set(OPTIMIZERS)


@pytest.mark.parametrize("line", commands())
def test_a_command_parses_and_its_settings_are_valid(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "raylm"
    options = parse(words[1:])
    overrides = getattr(options, "overrides", [])
    if words[1] in ("train", "plan", "data") and hasattr(options, "config"):
        assert (ROOT / options.config).is_file()
        load_config(TrainConfig, str(ROOT / options.config), overrides)
    elif words[1] == "serve":
        load_config(ServeConfig, {"model": options.model}, overrides)
    elif words[1] == "generate":
        prompts = [item for item in options.prompts if "=" not in item]
        given = [item for item in options.prompts if "=" in item]
        load_config(GenerateConfig, {"model": options.model, "prompts": prompts}, given)
    for word in words:
        assert not word.startswith("examples/") or (ROOT / word).exists()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_a_configuration_is_valid(block: str) -> None:
    given = yaml.safe_load(block)
    load_config(ServeConfig if isinstance(given["model"], str) else TrainConfig, given)


@pytest.mark.parametrize("item", settings())
def test_a_setting_of_a_table_is_valid(item: str) -> None:
    """For training or for a server; a section that belongs to a method or strategy stands with it."""
    belongs = {"lisa": ["training.method=lisa"], "lora": ["training.method=lora"]}
    belongs["deepspeed"] = ["training.strategy=deepspeed"]
    belongs["model"] = ["model.rope.type=linear", "model.rope.factor=2"] if "rope" in item else []
    section = item.partition(".")[0]
    if section == "engine":
        load_config(ServeConfig, {"model": "m"}, [item])
        return
    load_config(TrainConfig, MODEL, [*belongs.get(section, []), *_together(item), item])


def _together(item: str) -> list[str]:
    """What a setting needs beside it."""
    return {
        "training.eval_interval_steps=50": ["data.eval=e"],
        "training.micro_batch_size=4": ["training.global_batch_size=64"],
    }.get(item, [])


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"`((?:data|lora|metrics|optimizer|deepspeed)\.[a-z_]+)`", PAGE)))
)
def test_a_key_without_a_value_exists(key: str) -> None:
    section, _, name = key.partition(".")
    assert name in type(getattr(load_config(TrainConfig, MODEL), section)).model_fields


def test_a_wrong_setting_would_be_seen() -> None:
    assert len(settings()) > 45
    with pytest.raises(ConfigError):
        load_config(TrainConfig, MODEL, ["lisa.activated_layers=1"])


def test_links_lead_somewhere() -> None:
    assert all((ROOT / "docs" / name).is_file() for name in re.findall(r"\]\(([\w.-]+\.md)\)", PAGE))
