"""API keys: read on the driver, compared in the replica, and never sent between them.

What travels through Ray is the SHA-256 digest, so a key stands in no log, run file, command line or cluster state.
vLLM's own check guards /v1 only and leaves /metrics, /tokenize and others open; guard.py guards every route but health.
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from raylm.config.base import Section
from raylm.config.limits import Positive
from raylm.errors import ServingError, nearest

KEY_VARIABLE = "VLLM_API_KEY"
ONLY_KEY = "default"
_REMEDY = "Write a list of entries such as `{name: alice, key: …}` or `{name: bob, sha256: …}`."


@dataclass(frozen=True, slots=True, repr=False)
class ApiKey:
    """What may travel in place of a key: its name, its digest, and limits of its own."""

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __repr__(self) -> str:
        """Differs when the key does, and shows neither key nor digest."""
        mark = hashlib.sha256(self.digest).hexdigest()[:8]
        return f"ApiKey({self.name!r}, {mark}, {self.requests_per_minute}, {self.tokens_per_minute})"


def read_api_key(file: str | None) -> str | None:
    """What a client sends: the first line of `file`, else the variable VLLM_API_KEY as in vLLM, else None.

    Raises ServingError when the file cannot be read, its first line is empty, or it is a list of keys.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    if _is_yaml(file):
        raise ServingError(f"api_key_file {file}", "lists keys of a server.", "A client's file holds one key, as text.")
    lines = _read_text(file).splitlines()
    key = lines[0].strip() if lines else ""
    if not key:
        raise ServingError(f"api_key_file {file}", "has no key in its first line.", "Write the key there.")
    return key


def read_api_keys(file: str | None) -> tuple[ApiKey, ...]:
    """The keys a server asks for: those of a YAML list, or the one of `read_api_key`; empty when none is asked for.

    Raises ServingError that names file and entry; no key stands in it.
    """
    if file is None or not _is_yaml(file):
        only = read_api_key(file)
        return (ApiKey(ONLY_KEY, digest(only)),) if only else ()
    keys = [_read_entry(file, number, entry) for number, entry in enumerate(_read_list(file), start=1)]
    seen: dict[tuple[str, str | bytes], tuple[int, str]] = {}
    for number, key in enumerate(keys, start=1):
        for what, value in (("name", key.name), ("key", key.digest)):
            first, name = seen.setdefault((what, value), (number, key.name))
            if first != number:
                raise _entry_error(file, number, key.name, f"has the {what} of entry {first} ({name}).")
    return tuple(keys)


def digest(key: str) -> bytes:
    """What may travel in place of the key."""
    return hashlib.sha256(key.encode()).digest()


def find_key(keys: Sequence[ApiKey], authorization: bytes) -> ApiKey | None:
    """The key that an `authorization` header carries as bearer token. All are compared, found or not."""
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    sent = hashlib.sha256(token.strip()).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, sent):
            found = key
    return found


class _Entry(Section):
    """One key of the list."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@:+-]+$")
    key: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None

    @model_validator(mode="after")
    def the_key_or_its_digest(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("needs `key` or `sha256`, and not both")
        if self.key is not None and self.key.split() != [self.key]:
            raise ValueError("key is empty or has white space")
        return self


def _read_entry(file: str, number: int, entry: Any) -> ApiKey:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(entry, dict):
        raise _entry_error(file, number, None, "is not a mapping.")
    for field_name in entry:
        if field_name not in _Entry.model_fields:
            # A key written as `sk-…: …` by mistake must not be shown.
            hint = nearest(str(field_name), _Entry.model_fields)
            raise _entry_error(file, number, name, f"has an unknown field. {hint}")
    try:
        checked = _Entry.model_validate(entry)
    except ValidationError as error:
        raise _entry_error(file, number, name, _describe(error)) from None
    found = bytes.fromhex(checked.sha256) if checked.sha256 else digest(checked.key or "")
    return ApiKey(checked.name, found, checked.requests_per_minute, checked.tokens_per_minute)


def _describe(error: ValidationError) -> str:
    """The first fault, without the value: it may be a key."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":
        return f"{fault['ctx']['error']}."
    if fault["type"] == "string_type":
        return f"{where} is not text: put it in quotes."
    if fault["type"] == "missing":
        return f"{where} is missing."
    return f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}."


def _entry_error(file: str, number: int, name: Any, problem: str) -> ServingError:
    shown = f" ({name})" if isinstance(name, str) and name.isprintable() and len(name) <= 64 else ""
    return ServingError(f"api_key_file {file}", f"entry {number}{shown} {problem}", _REMEDY)


def _read_list(file: str) -> list[Any]:
    import yaml

    from raylm.config.load import UniqueKeyLoader

    try:
        entries = yaml.load(_read_text(file), Loader=UniqueKeyLoader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        # YAML's own message quotes the text, which may be a key.
        raise ServingError(f"api_key_file {file}", f"is not valid YAML{line}.", _REMEDY) from None
    if not isinstance(entries, list) or not entries:
        raise ServingError(f"api_key_file {file}", "is not a list of keys.", _REMEDY)
    return entries


def _read_text(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ServingError(
            f"api_key_file {file}",
            f"cannot be read: {reason}.",
            "Give a text file whose first line is the key, or a YAML list of keys.",
        ) from None


def _is_yaml(file: str) -> bool:
    return Path(file).suffix.lower() in (".yaml", ".yml")
