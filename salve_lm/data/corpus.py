"""What a text corpus is: documents in a fixed order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from salve_lm.hashing import hash_listed


class Document(NamedTuple):
    """One document.

    Attributes:
        text: what follows the prompt; everything, where there is none.
        prompt: its beginning, which `completion_only` training does not learn.
        group: a class of documents (the subject of a problem), or None.
        messages: a conversation, to be written out by the tokenizer's chat template, each message
            with `role` and `content`; `text` and `prompt` are then not used.
    """

    text: str
    prompt: str = ""
    group: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


class Corpus(ABC):
    """A source of documents, as a config names it with `class_path` and `init_args`."""

    @abstractmethod
    def documents(self) -> Sequence[Document]:
        """All documents, the same in the same order every time and on every rank; none is empty.

        Raises:
            SalveError: of a kind that names the cure; also where there is no document.
        """

    def stream(self) -> Iterator[Document]:
        """The same documents, one after the other; corpora of files hold only a few at a time.

        Raises:
            SalveError: as `documents`, when the document in question is reached.
        """
        yield from self.documents()

    def fingerprint(self) -> str:
        """A hash of all documents."""
        return hash_listed(tuple(d) for d in self.stream())
