"""The text that every Python brings: the reference pages behind `help("assert")`.

`pydoc_data.topics` holds about 80 chapters of the language reference, 430,000 characters of English
and code, under the licence of Python itself (PSF-2.0). It is there without a download, but every
version of Python has its own text. What must be repeatable therefore reads a file that was written
from it once; `PydocTopics` can also insist on one version's text by its hash.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from salve_lm.atomic import atomic_file
from salve_lm.data.corpus import Corpus, Document
from salve_lm.errors import BadConfig


class PydocTopics(Corpus):
    """The chapters of `pydoc_data.topics` of the running Python; runs of blanks collapsed.

    Args:
        limit: Only the first so many chapters, by name.
        sha256: The `fingerprint` that the text must have; another version of Python is then an
            error in place of another result.
    """

    def __init__(self, limit: int | None = None, sha256: str | None = None) -> None:
        if limit is not None and limit < 1:
            raise BadConfig(f"limit is {limit}; give at least 1 chapter, or leave it out.")
        self.limit, self.sha256 = limit, sha256

    def documents(self) -> Sequence[Document]:
        """One document a chapter, by name; `group` is the chapter's name.

        Raises:
            BadConfig: a text other than `sha256` says.
        """
        from pydoc_data.topics import topics

        names = sorted(topics)[: self.limit]
        found = [Document(collapsed(topics[name]), group=name) for name in names]
        if self.sha256 is not None and self._hash(found) != self.sha256:
            raise BadConfig(
                f"Python {platform.python_version()} brings other pydoc topics ("
                f"{self._hash(found)}) than the {self.sha256} asked for. Use the Python that they "
                "came from, a file that was written from it, or leave sha256 out."
            )
        return found

    def write(self, path: str | Path) -> Path:
        """Write the chapters as jsonl, `{"text": ..., "topic": ...}` a line, for a `TextCorpus`.

        Raises:
            OutputUnwritable: the file cannot be written.
        """
        with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as f:
            for document in self.documents():
                f.write(json.dumps({"topic": document.group, "text": document.text}) + "\n")
        return Path(path)

    @staticmethod
    def _hash(documents: Sequence[Document]) -> str:
        from salve_lm.hashing import hash_plain

        return hash_plain([tuple(d) for d in documents])


def collapsed(text: str) -> str:
    """`text` with runs of blanks and of empty lines replaced by one."""
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r" ?\n\s*\n ?", "\n\n", text).strip()
