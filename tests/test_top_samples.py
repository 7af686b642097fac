from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salve_lm.commands.discover import TopSamples


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    k=st.integers(1, 6),
    cuts=st.lists(st.integers(1, 59), max_size=4),
    ranks=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_top_samples_are_those_of_a_sorted_list(
    values: list[int], k: int, cuts: list[int], ranks: int
) -> None:
    """Many ties: the lower sample first, however the samples come in batches and ranks."""
    z = torch.tensor([[v / 2, -v, abs(v)] for v in values])
    sample = torch.arange(len(values)) * 3
    label = sample % 5
    edges = sorted({0, *(c for c in cuts if c < len(values)), len(values)})
    tops = [TopSamples(k) for _ in range(ranks)]
    for i, (start, stop) in enumerate(pairwise(edges)):
        tops[i % ranks].update(z[start:stop], sample[start:stop], label[start:stop])
    for other in tops[1:]:
        tops[0].merge(other)
    table = tops[0].table([str(c) for c in range(5)])
    for latent in range(3):
        for direction, sign in (("+", 1), ("-", -1)):
            found = table[(table["latent"] == latent) & (table["direction"] == direction)]
            active = [(-sign * float(v), int(s)) for v, s in zip(z[:, latent], sample, strict=True)]
            best = [pair for pair in sorted(active) if pair[0] < 0][:k]
            assert list(found["sample"]) == [s for _, s in best]
            assert list(found["activation"]) == [-sign * v for v, _ in best]
            assert list(found["label"]) == [s % 5 for _, s in best]
