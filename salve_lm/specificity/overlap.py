"""Whether the reference corpus is really another corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from salve_lm.errors import BadConfig
from salve_lm.hashing import hash_plain

MOST_SHARED = 0.1
"""Share of the task's documents that may also be in the reference corpus."""


@dataclass(frozen=True)
class Overlap:
    """What two corpora share, by the hashes of their documents.

    Attributes:
        task: hash of the task corpus, of its documents in their order.
        reference: hash of the reference corpus.
        shared: task documents that are in the reference corpus too.
        share: their share of all task documents.
    """

    task: str
    reference: str
    shared: int
    share: float


def check_overlap(task: Sequence[object], reference: Sequence[object]) -> Overlap:
    """Compare two corpora document by document.

    Args:
        task: documents as plain values (texts).
        reference: the same of the reference corpus.

    Raises:
        BadConfig: they are one corpus, or share more than `MOST_SHARED` of the task's documents.
    """
    hashes = [[hash_plain(d) for d in corpus] for corpus in (task, reference)]
    known = set(hashes[1])
    shared = sum(h in known for h in hashes[0])
    share = shared / max(len(task), 1)
    found = Overlap(hash_plain(hashes[0]), hash_plain(hashes[1]), shared, share)
    if set(hashes[0]) == known:
        raise BadConfig(
            "The reference corpus is the task corpus: every latent would be equally active in "
            "both. Give text of another kind as `reference`."
        )
    if found.share > MOST_SHARED:
        raise BadConfig(
            f"{shared} of the {len(task)} task documents ({found.share:.0%}) are in the reference "
            "corpus too. Remove them from `reference`, or give other text."
        )
    return found
