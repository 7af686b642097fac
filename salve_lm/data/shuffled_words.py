"""A reference corpus with the surface of a task: its documents, their words in another order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from salve_lm.data.corpus import Corpus, Document
from salve_lm.errors import BadConfig


class ShuffledWords(Corpus):
    """The documents of another corpus, the words of each (its prompt's too) in a random order.

    What a latent tells of words, digits and symbols alone is the same in both, so that a contrast
    with the corpus itself shows what needs their order: METHODS 6 asks for references that match
    the task on the surface.

    Args:
        corpus: Whose documents are shuffled; conversations (chat templates) have no plain text.
        seed: Of the order of the words.
    """

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.corpus, self.seed = corpus, seed

    def documents(self) -> Sequence[Document]:
        """One for each document of `corpus`, in its order, with the same words and group.

        Raises:
            BadConfig: a document is a conversation.
            SalveError: see the corpus's own `documents`.
        """
        return [self._shuffled(i, d) for i, d in enumerate(self.corpus.documents())]

    def _shuffled(self, index: int, document: Document) -> Document:
        if document.messages is not None:
            raise BadConfig(
                "ShuffledWords takes plain documents, not conversations: set chat_template: false."
            )
        words = f"{document.prompt} {document.text}".split()
        random.Random(f"{self.seed}:{index}").shuffle(words)
        return Document(" ".join(words), group=document.group)
