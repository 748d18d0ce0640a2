"""The configuration of offline generation."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from raylm.config.base import Section
from raylm.config.data import Sources
from raylm.config.speculation import SpeculationSection

STRUCTURES = ("json", "regex", "choice", "grammar")


def _as_texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


class GenerateConfig(Section):
    """Everything `raylm generate` needs: one model, prompts or dataset files, and where the answers go."""

    model: str = Field(min_length=1)
    """Hub id, folder or GGUF file; `pkg://PACKAGE/FILE` names a file that an installed Python package ships."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """LoRA adapter to answer with: a PEFT adapter folder."""
    prompts: tuple[str, ...] = ()
    """User messages to answer."""
    data: Sources = ()
    """Datasets to answer, as `data.train` of training: a path, or a list of paths and of mappings with path, format,
    columns, template, …"""
    output: str = "generations.jsonl"
    """A file that ends with .jsonl, .jsonl.gz or .parquet, one object a row in the order of the input; or a folder, for
    shards in the order in which they get ready."""
    system: str | None = None
    """System message put before conversations that have none."""
    template: str = "auto"
    """Conversation template, as `data.template` of training; `none` completes plain text as it stands."""
    role_map: dict[str, str] = {}
    """Names of roles in the data -> system, user, assistant or tool."""
    turns: Literal["last", "all"] = "last"
    """Answer the last turn of a conversation, or each turn of the assistant in order, with the history so made."""
    max_rows: int | None = Field(None, ge=1)
    """Answer at most this many rows: the first in the order of the files."""
    on_error: Literal["keep", "stop"] = "keep"
    """A row that cannot be answered is written with its reason and counted, or stops the run."""
    overwrite: bool = False
    """Start anew where the output holds answers of other settings, or of input that has changed."""

    n: int = Field(1, ge=1)
    """Answers to each prompt."""
    max_tokens: int = Field(256, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability."""
    top_k: int = Field(0, ge=0)
    """Sample from this many of the likeliest tokens; 0 is all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that the prompt or the answer has become less likely."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the logit of each token that the answer has."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the logit of a token for each time that the answer has it."""
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = ()
    """Texts that end an answer; they are not part of it."""
    seed: int = Field(0, ge=0)
    """Seed of sampling; each row draws from a seed of its own, made of this one and its id."""
    logprobs: int | None = Field(None, ge=0)
    """Log-probability of each token of the answer, and of this many of the likeliest in its place; before temperature
    and top_p."""
    structured: dict[str, Any] = {}
    """What each answer must be: {json: SCHEMA}, {regex: PATTERN}, {choice: [TEXT, …]} or {grammar: EBNF}."""

    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer in tokens; default: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the engine computes in; `auto` is the model's, or float32 on a CPU without bfloat16 arithmetic."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache on a machine without GPU."""
    engine: dict[str, Any] = {}
    """Further engine arguments under vLLM's own names, such as `tensor_parallel_size` or `speculative_config`."""
    speculation: SpeculationSection | None = None
    """Speculative decoding, as in serving. It helps where few prompts run at a time."""
    num_replicas: int = Field(1, ge=1)
    """Engines working beside each other."""
    num_cpus: int = Field(1, ge=1)
    """CPUs of one engine; without GPU also its compute threads."""
    batch_size: int = Field(64, ge=1)
    """Rows an engine receives, and the output grows by, at once; it always works on several of these batches."""
    shard_rows: int = Field(10_000, ge=1)
    """Rows of a shard, at least, where the output is a folder."""
    shard_format: Literal["jsonl", "jsonl.gz", "parquet"] = "jsonl"
    """What the shards of a folder are."""
    cluster_address: str | None = None
    """Address of a running cluster; without it as in `cluster.address` of training."""

    @model_validator(mode="after")
    def there_is_something_to_answer(self) -> Self:
        if not self.prompts and not self.data:
            raise ValueError("give prompts or data to answer")
        return self

    @model_validator(mode="after")
    def several_answers_are_sampled(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n} at temperature 0 would be the same answer {self.n} times: set temperature")
        return self

    @model_validator(mode="after")
    def a_history_has_one_answer_a_turn(self) -> Self:
        if self.n > 1 and self.turns == "all":
            raise ValueError(f"turns=all goes on with each answer, so it excludes n={self.n}")
        return self

    @model_validator(mode="after")
    def plain_text_has_no_system_message(self) -> Self:
        if self.template == "none" and self.system:
            raise ValueError("template=none completes plain text, so it excludes system")
        return self

    @model_validator(mode="after")
    def there_is_one_structure(self) -> Self:
        if self.structured and (len(self.structured) > 1 or next(iter(self.structured)) not in STRUCTURES):
            raise ValueError(f"structured takes one of {', '.join(STRUCTURES)}, not {', '.join(self.structured)}")
        return self
