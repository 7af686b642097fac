"""The places in the text that set off each latent most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from salve_lm.specificity.documents import LEFT_OUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = "⟦", "⟧"


class TopPlaces:
    """The k strongest places of every latent, one for each stretch of a document.

    Keeps 24 k d_sae bytes. Equal activations: the place that comes first in the text, so that any
    number of ranks finds the same.

    Args:
        k: places a latent.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._value = torch.empty(0, 0)
        self._place = torch.empty(0, 0, dtype=torch.int64)
        self._document = torch.empty(0, 0, dtype=torch.int64)

    def update(self, document: Tensor, place: Tensor, activation: Tensor) -> None:
        """Take in tokens.

        Args:
            document: int64 [n]; `LEFT_OUT` for a token that must not count.
            place: where each token stands in the corpus, int64 [n].
            activation: [n, d_sae].
        """
        values, places, documents = [], [], []
        start = 0
        runs, lengths = torch.unique_consecutive(document, return_counts=True)
        for d, length in zip(runs.tolist(), lengths.tolist(), strict=True):
            rows = slice(start, start + length)
            start += length
            if d != LEFT_OUT:
                best = activation[rows].max(0)
                values.append(best.values)
                places.append(place[rows].to(best.indices.device)[best.indices])
                documents.append(torch.full_like(best.indices, d))
        if values:
            found = (torch.stack(part).cpu() for part in (values, places, documents))
            value, where, which = found
            self._merge(value.float(), where, which)

    def merge(self, other: TopPlaces) -> None:
        """Take in what another rank found."""
        if len(other._value):
            self._merge(other._value, other._place, other._document)

    def of(self, latent: int) -> list[tuple[float, int, int]]:
        """`(activation, place, document)` of one latent, the strongest first; active ones only."""
        if not len(self._value):
            return []
        columns = (t[:, latent].tolist() for t in (self._value, self._place, self._document))
        return [entry for entry in zip(*columns, strict=True) if entry[0] > 0]

    def _merge(self, value: Tensor, place: Tensor, document: Tensor) -> None:
        if len(self._value):
            value = torch.cat([self._value, value])
            place = torch.cat([self._place, place])
            document = torch.cat([self._document, document])
        by_place = place.argsort(dim=0, stable=True)
        value, place, document = (t.gather(0, by_place) for t in (value, place, document))
        order = value.argsort(dim=0, descending=True, stable=True)[: self.k]
        self._value, self._place, self._document = (
            t.gather(0, order) for t in (value, place, document)
        )


class TextWindow(NamedTuple):
    """A token and the text around it."""

    before: str
    token: str
    after: str

    @property
    def text(self) -> str:
        """All of it, with the token marked."""
        return f"{self.before}{MARKS[0]}{self.token}{MARKS[1]}{self.after}"


def text_window(
    ids: list[int], at: int, tokenizer: PreTrainedTokenizerBase, radius: int = 16
) -> TextWindow:
    """The text around token `at` of `ids`.

    Pieces are cut out of longer decoded texts: a token decoded alone can lose its leading space.

    Args:
        ids: tokens of one document.
        at: index of the token in them.
        tokenizer: decodes them.
        radius: tokens before and after it.
    """
    first = max(0, at - radius)

    def decoded(stop: int) -> str:
        options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(ids[first:stop], **options))

    before, upto, whole = decoded(at), decoded(at + 1), decoded(at + 1 + radius)
    if upto.startswith(before) and whole.startswith(upto):
        return TextWindow(before, upto[len(before) :], whole[len(upto) :])
    # a character that is spread over several tokens
    return TextWindow(before, str(tokenizer.decode([ids[at]])), "")
