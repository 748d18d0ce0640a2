"""Loading a tokenizer from a hub id or a folder."""

from typing import Any

from raylm.errors import ModelError


def load_tokenizer(folder: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a model; folder: hub id, or a folder that `models.folder.as_folder` returned.

    Raises ModelError when it cannot be loaded or has no fast (offset-keeping) form.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(folder, f"its tokenizer cannot be loaded: {reason}", "Check the path or hub id.") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(folder, "has no fast tokenizer, which exact loss masks need.", "Add a tokenizer.json.")
    return tokenizer
