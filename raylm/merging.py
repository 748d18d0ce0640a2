"""`raylm adapter merge`: an adapter and its base as one model folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from raylm.config.sections import ModelSection
from raylm.data.templates.table import AUTO, chat_template
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ModelError
from raylm.models.adapters import load_adapted
from raylm.models.export import export_model, storage_dtype
from raylm.models.folder import is_adapter
from raylm.models.load import load_config
from raylm.models.vocabulary import check_output


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written."""

    output: str
    base: str


def run_merge(adapter: Path, output: Path, base: str | None) -> MergeResult:
    """Writes the base with the adapter merged into it, with the tokenizer beside the adapter, in the base's type.

    base: default: the model that the adapter names. Raises RaylmError.
    """
    adapter, output = adapter.expanduser(), output.expanduser()
    check_output(output)
    if not is_adapter(str(adapter)):
        raise ModelError(str(adapter), "has no adapter_config.json, so it is not an adapter folder.")
    base = base or json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(str(adapter), "names no base model.", "Give it with --base.")
    section = ModelSection(path=base)
    dtype = storage_dtype("auto", load_config(section))
    tokenizer = load_tokenizer(str(adapter))
    end = chat_template(AUTO, tokenizer, str(adapter)).end_token() if tokenizer.chat_template else tokenizer.eos_token
    model = load_adapted(section, adapter, num_tokens=len(tokenizer))
    export_model(model, tokenizer, output, dtype=dtype, end_token=end)
    return MergeResult(str(output), base)
