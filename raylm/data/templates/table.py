"""Templates by name: the tokenizer's own, a preset, a YAML file, or one line of text."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from raylm.data.templates.conversation import ConversationTemplate, Sequel, ToolListing, render
from raylm.data.templates.jinja import TokenizerTemplate
from raylm.data.templates.literal import control_tokens
from raylm.data.templates.presets import PRESETS
from raylm.data.templates.segments import Segment
from raylm.data.templates.to_jinja import to_jinja
from raylm.errors import DataError, ModelError, nearest

logger = logging.getLogger(__name__)

AUTO = "auto"


class ChatTemplate(Protocol):
    """What the data room needs of a template."""

    name: str

    def render(self, conversation: Mapping[str, Any]) -> list[Segment]:
        """The whole conversation. Raises RowProblem."""

    def prompt(self, conversation: Mapping[str, Any]) -> str:
        """The text that asks the model for the next answer. Raises RowProblem."""

    def end_token(self) -> str | None:
        """The control token that ends an answer, if it is one."""

    def jinja(self) -> str:
        """The template as servers read it."""


_TOKEN = re.compile(r"<[|｜][^<>\s]+[|｜]>|<(?:start|end)_of_turn>")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            if field.name not in ("source", "default_system", "name"):
                yield from _texts(getattr(value, field.name))


class PresetTemplate:
    """A declared template with the tokens of one tokenizer."""

    def __init__(self, template: ConversationTemplate, tokenizer: Any, name: str) -> None:
        """name: of the model, for messages. Raises ModelError when the tokenizer lacks a token the template needs."""
        self.name = template.name
        self._template = template
        self._bos, self._eos = tokenizer.bos_token, tokenizer.eos_token
        if not self._eos and "{eos}" in str(template):
            raise ModelError(name, f"its tokenizer has no end token, which the template {template.name} needs.")
        self._control_tokens = control_tokens(tokenizer)
        self._warn_of_missing_tokens(tokenizer, name)

    def _warn_of_missing_tokens(self, tokenizer: Any, name: str) -> None:
        known = set(self._control_tokens)
        for token in sorted({token for text in _texts(self._template) for token in _TOKEN.findall(text)}):
            if token not in known and token not in tokenizer.get_vocab():
                logger.warning(
                    "%s has no token %s, which the template %s uses: it is written as ordinary text",
                    name,
                    token,
                    self.name,
                )

    def render(self, conversation: Mapping[str, Any]) -> list[Segment]:
        """The whole conversation. Raises RowProblem."""
        return render(self._template, conversation, bos_token=self._bos, eos_token=self._eos)

    def prompt(self, conversation: Mapping[str, Any]) -> str:
        """The text that asks the model for the next answer. Raises RowProblem."""
        segments = render(
            self._template, conversation, bos_token=self._bos, eos_token=self._eos, add_generation_prompt=True
        )
        return "".join(segment.text for segment in segments)

    def end_token(self) -> str | None:
        """The control token that ends an answer, or None where the template ends answers without one."""
        end = self._template.end if self._template.last_end is None else self._template.last_end
        end = end.replace("{eos}", self._eos or "")
        return next((token for token in self._control_tokens if end.endswith(token)), None)

    def jinja(self) -> str:
        """The template as servers read it."""
        return to_jinja(self._template)


def get_template(name: str) -> ConversationTemplate:
    """A preset by name. Raises DataError naming the nearest."""
    if name not in PRESETS:
        raise DataError("data.template", f"{name!r} is no template.", nearest(name, PRESETS))
    return PRESETS[name]


def chat_template(setting: str, tokenizer: Any, name: str) -> ChatTemplate:
    """The template that a `data.template` setting means, for a tokenizer; name: of the model, for messages.

    Raises DataError for an unknown or faulty template, ModelError where it does not fit the tokenizer.
    """
    if setting == AUTO:
        return TokenizerTemplate(tokenizer, name)
    return PresetTemplate(read_template(setting), tokenizer, name)


def read_template(setting: str) -> ConversationTemplate:
    """A preset, a YAML file, or one line with `{input_text}`. Raises DataError."""
    if "{input_text}" in setting:
        return one_line(setting)
    if setting.endswith((".yaml", ".yml")):
        return _from_yaml(setting)
    return get_template(setting)


def one_line(prompt: str, end: str = "{eos}") -> ConversationTemplate:
    """`###Human: {input_text}###Assistant:` as a template; end: ends an answer."""
    before, found, header = prompt.partition("{input_text}")
    if not found or "{input_text}" in header:
        raise DataError("data.template", f"{prompt!r} must hold {{input_text}} once.")
    return ConversationTemplate(name="one line", user=before + "{content}", header=header, end=end)


def _from_yaml(path: str) -> ConversationTemplate:
    import yaml

    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}.", "Check data.template.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(path, f"is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise DataError(path, "is not a mapping of a template's parts.", "See docs/data.md.")
    tree = {"name": Path(path).stem, **tree}
    if "prompt" in tree:
        _check_keys(path, tree, ("name", "prompt", "end"))
        return replace(one_line(str(tree["prompt"]), str(tree.get("end", "{eos}"))), name=tree["name"])
    base = get_template(tree.pop("base")) if "base" in tree else None
    _check_keys(path, tree, [field.name for field in fields(ConversationTemplate)])
    parts = dict(tree)
    for key, kind in (("tools", ToolListing), ("calls", Sequel), ("results", Sequel)):
        if isinstance(parts.get(key), dict):
            _check_keys(f"{path}: {key}", parts[key], [field.name for field in fields(kind)])
            parts[key] = kind(**parts[key])
    try:
        return replace(base, **parts) if base else ConversationTemplate(**parts)
    except (TypeError, ValueError) as error:
        raise DataError(path, f"is not a whole template: {error}.", "See docs/data.md.") from None


def _check_keys(where: str, tree: Mapping[str, Any], known: Any) -> None:
    for key in tree:
        if key not in known:
            raise DataError(where, f"unknown key {key}.", nearest(str(key), known))
