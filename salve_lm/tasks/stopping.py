"""Where an output ends: at one of several texts, however the tokenizer splits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopTexts:
    """Finds the first of `texts` in outputs that grow token by token.

    A text can only be completed by a token that holds one of the last characters, so the output is
    decoded for those few tokens alone, and then as a whole: the answer does not depend on how the
    text was split into tokens.

    Args:
        texts: what ends an output; none at all is allowed.
        tokenizer: decodes outputs, without special tokens.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._texts = tuple(texts)
        self._last = frozenset(text[-1] for text in texts)
        self._tokenizer = tokenizer
        self._may_end: dict[int, bool] = {}

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the last of the generated `ids` completes one of the texts."""
        if not self._texts or not self._may_complete(ids[-1]):
            return False
        output = self.decode(ids)
        return any(text in output for text in self._texts)

    def cut(self, output: str) -> str:
        """`output` up to the first of the texts."""
        found = [at for at in (output.find(text) for text in self._texts) if at >= 0]
        return output[: min(found)] if found else output

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _may_complete(self, token: int) -> bool:
        known = self._may_end.get(token)
        if known is None:
            # U+FFFD: a part of a character, which may be the last one
            text = self.decode([token])
            known = "\ufffd" in text or any(c in self._last for c in text)
            self._may_end[token] = known
        return known
