"""The configuration of a vocabulary extension."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from raylm.config.base import Section
from raylm.config.data import Sources
from raylm.config.sections import ModelSection


class VocabularyConfig(Section):
    """Everything `raylm vocab extend` needs: a model, what its tokenizer should learn, and where the result goes."""

    model: str = Field(min_length=1)
    """Hub id, folder or GGUF file; `pkg://PACKAGE/FILE` names a file that an installed Python package ships."""
    output: str = Field(min_length=1)
    """Folder for the extended model; it must be absent or empty."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that a model repository ships. Off unless you trust its author."""
    corpus: Sources = ()
    """Datasets to learn pieces from: a path, or a list of paths and of mappings as in `data.train`."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Pieces to learn from `corpus`."""
    min_frequency: int = Field(5, ge=1)
    """A piece must save at least this many tokens in `corpus`."""
    tokens: tuple[str, ...] = ()
    """Texts that become one token each, wherever they occur."""
    special: tuple[str, ...] = ()
    """Control tokens, such as `<|act|>`: what somebody typed never becomes one, and decoding can leave them out."""
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    """Rows of the embedding become a multiple of this, filled with further learnt pieces: no row is without token."""

    @model_validator(mode="after")
    def there_is_something_to_add(self) -> Self:
        if not (self.corpus or self.tokens or self.special):
            raise ValueError("give a corpus to learn pieces from, tokens, or special tokens")
        return self

    @model_validator(mode="after")
    def learning_needs_a_corpus_and_a_size(self) -> Self:
        if bool(self.corpus) != (self.size is not None):
            raise ValueError("corpus and size go together. Give both, or neither")
        return self

    @model_validator(mode="after")
    def tokens_are_texts_that_differ(self) -> Self:
        named = [*self.tokens, *self.special]
        twice = next((token for place, token in enumerate(named) if token in named[:place]), None)
        if twice is not None:
            raise ValueError(f"token {twice!r} is given twice")
        blank = next((token for token in named if not token or token != token.strip()), None)
        if blank is not None:
            raise ValueError(f"token {blank!r} is empty, or begins or ends with white space")
        return self

    @property
    def model_section(self) -> ModelSection:
        """The model as training names it."""
        return ModelSection(path=self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
