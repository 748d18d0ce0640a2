from pathlib import Path

import pytest
import yaml

from raylm.config import GenerateConfig, TrainConfig, dump_yaml, load_config
from raylm.errors import ConfigError

BASE = {"model": {"path": "model"}, "data": {"train": "data.json"}}


def test_a_file_overrides_and_a_mapping_give_the_same_tree(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: model}\ndata: {train: data.json}\n")
    from_file = load_config(TrainConfig, path, ["optimizer.learning_rate=1e-4", "training.num_epochs=2"])
    from_mapping = load_config(TrainConfig, {**BASE, "optimizer.learning_rate": 1e-4}, {"training": {"num_epochs": 2}})
    assert from_file == from_mapping
    assert from_file.optimizer.learning_rate == 1e-4
    assert load_config(TrainConfig, from_file, ["run.seed=3"]).run.seed == 3


def test_a_value_with_a_hash_is_no_comment() -> None:
    overrides = ["data.template=###Human: {input_text}###Assistant:", "lora=null"]
    assert load_config(TrainConfig, BASE, overrides).data.template == "###Human: {input_text}###Assistant:"


def test_the_resolved_tree_can_be_run_again(tmp_path: Path) -> None:
    config = load_config(TrainConfig, BASE, ["training.method=lora", "lora.rank=4", "data.role_map={bot: assistant}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(TrainConfig, path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learnin_rate=1", "unknown key optimizer.learnin_rate. Did you mean optimizer.learning_rate?"),
        ("trainig.num_epochs=1", "unknown key trainig. Did you mean training?"),
        ("learning_rate=1", "unknown key learning_rate. Did you mean optimizer.learning_rate?"),
        ("training.num_epochs=two", "training.num_epochs='two' is not valid: input should be a valid integer"),
        ("training.micro_batch_size=3", "global_batch_size (8) must be a multiple of micro_batch_size (3)"),
        ("cluster.num_workers=3", "must be a multiple of training.micro_batch_size x cluster.num_workers = 3"),
        ("cluster.num_workers=[1, 9]", "is 8 micro-batches, fewer than the 9 workers of cluster.num_workers"),
        ("cluster.num_workers=[3, 2]", r"num_workers=[3, 2] must be [min, max]"),
        ("lora.rank=4", "section lora excludes training.method=full"),
        ("training.eval_interval_steps=2", "training.eval_interval_steps needs data.eval"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate=nan is not valid"),
        ("model.path.x=1", "override model.path.x: path holds a value, not a section."),
        ("justakey", "override 'justakey': is not of the form section.key=value."),
    ],
)
def test_faults_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, BASE, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.strategy=single", "cluster.num_workers=2"],
        ["run.overwrite=true", "training.resume=auto"],
    ],
)
def test_options_that_exclude_each_other(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="excludes"):
        load_config(TrainConfig, BASE, overrides)


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path is missing\. Set it in the file or as model\.path=…"):
        load_config(TrainConfig, {"model": {}, "data": {"train": "x"}})
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(TrainConfig, tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("model: {path: a\ndata: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml:2: not valid YAML"):
        load_config(TrainConfig, tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("model: {path: a}\nmodel: {path: b}\n")
    with pytest.raises(ConfigError, match="key 'model' is given twice"):
        load_config(TrainConfig, tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="a configuration is a mapping"):
        load_config(TrainConfig, tmp_path / "list.yaml")


def test_sections_are_frozen() -> None:
    config = load_config(TrainConfig, BASE)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1  # type: ignore[misc]


def test_derived_values() -> None:
    config = load_config(TrainConfig, BASE, ["cluster.num_workers=2", "training.global_batch_size=12"])
    assert config.gradient_accumulation_steps() == 6
    assert config.strategy == "ddp"
    assert load_config(TrainConfig, BASE).strategy == "single"
    elastic = load_config(TrainConfig, BASE, ["cluster.num_workers=[1, 3]"])
    assert (elastic.strategy, elastic.cluster.min_workers, elastic.cluster.max_workers) == ("ddp", 1, 3)
    assert [elastic.gradient_accumulation_steps(size) for size in (1, 2, 3)] == [8, 4, 3]


def test_generation_needs_prompts() -> None:
    with pytest.raises(ConfigError, match="give prompts or data to answer"):
        load_config(GenerateConfig, {"model": "m"})


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_loads(path: Path) -> None:
    kinds = {"model" in (tree := yaml.safe_load(path.read_text())) and isinstance(tree["model"], dict): TrainConfig}
    load_config(kinds[True], path)
