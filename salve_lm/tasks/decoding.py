"""Greedy decoding of many prompts: left-padded, with shared beginnings and refilled batches.

Keys and values lie left-padded in the cache: `[padding][prompt][generated]`, every row ending at
the same place, so that distances within a row (rotary angles, sliding windows) are those of the row
alone. Three things make it faster than decoding batch by batch until the last row ends:

- The tokens that all prompts begin with (worked examples) run through the model once, not once a
  row.
- A row leaves the batch with its last token, and waiting prompts take the places of finished rows.
- Rows are told apart by lengths and lists of tokens; text is decoded only where an output may end.

The cache keeps all tokens of every layer, also of those with a sliding window: what a window hides
is masked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from salve_lm.errors import BadConfig
from salve_lm.tasks.context import input_device

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

# a shared beginning shorter than this is not worth a pass of its own
_WORTH_SHARING = 8


class Decoded(NamedTuple):
    """What one prompt was continued with.

    prompt: its index.
    ids: generated tokens, without the end token, with the tokens of a stop text.
    truncated: `max_new_tokens` were generated and nothing had ended the output.
    """

    prompt: int
    ids: list[int]
    truncated: bool


@dataclass
class _Rows:
    """Rows being decoded. Their keys and values are in `cache`, [rows, heads, length, d_head]."""

    prompts: list[int]
    ids: list[list[int]]
    cache: DynamicCache
    mask: Tensor  # [rows, length]: 1 for tokens, 0 for padding on the left
    lengths: Tensor  # [rows]: tokens in the cache
    tokens: Tensor  # [rows]: the newest, not in the cache yet

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, and padding that all of these have."""
        index = torch.tensor(rows, device=self.mask.device)
        self.prompts = [self.prompts[i] for i in rows]
        self.ids = [self.ids[i] for i in rows]
        self.lengths, self.tokens = self.lengths[index], self.tokens[index]
        start = self.mask.shape[1] - int(self.lengths.max())
        self.mask = self.mask[index, start:]
        for layer in _layers(self.cache):
            layer.keys = layer.keys[index, :, start:]
            layer.values = layer.values[index, :, start:]

    def join(self, other: _Rows) -> None:
        """Take up the rows of `other`."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        self.prompts += other.prompts
        self.ids += other.ids
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.mask = torch.cat([_padded(r.mask, longest, 1) for r in (self, other)])
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            mine.keys = torch.cat([_padded(x.keys, longest, 2) for x in (mine, theirs)])
            mine.values = torch.cat([_padded(x.values, longest, 2) for x in (mine, theirs)])


@torch.no_grad()
def greedy_decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    ended: Callable[[list[int]], bool],
    rows: int,
    share_prefix: bool = True,
) -> Iterator[Decoded]:
    """Continue each of `prompts` with the most likely tokens; yields each as soon as it has ended.

    The same tokens as decoding each prompt alone, up to rounding: sums of different order may tip
    a tie, which bfloat16 has often and float32 hardly ever.

    Args:
        model: a causal language model of transformers with rotary or learned positions, in eval
            mode.
        prompts: tokens of each, none empty, each at most the model's context less
            `max_new_tokens`.
        max_new_tokens: the most tokens to generate for a prompt.
        end_tokens: tokens that end an output.
        ended: whether an output (its tokens so far) ends here; asked after every token.
        rows: prompts decoded at once.
        share_prefix: run the tokens that all prompts begin with through the model once.

    Raises:
        BadConfig: the model keeps something else than keys and values (a recurrent state).
        torch.OutOfMemoryError: `rows` do not fit; what was not yielded can be tried again.
    """
    waiting = deque(range(len(prompts)))
    prefix = _prefix(model, prompts) if share_prefix else None
    live: _Rows | None = None
    while waiting or live is not None:
        free = rows - (len(live.prompts) if live is not None else 0)
        # an intake costs a pass: not for every single free row
        if live is None or (waiting and free >= max(1, rows // 4)):
            taken = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            current, intake = _start(model, prompts, taken, prefix), True
        else:
            current, intake = live, False
            _advance(model, current)
        finished = _finish(current, max_new_tokens, end_tokens, ended)
        yield from finished.values()
        left = [i for i in range(len(current.prompts)) if i not in finished]
        if finished and left:
            current.keep(left)
        if not intake or live is None:
            live = current if left else None
        elif left:
            live.join(current)


class _Prefix(NamedTuple):
    """Tokens that all prompts share, and their keys and values [1, heads, length, d_head]."""

    length: int
    keys: list[Tensor]
    values: list[Tensor]


def _prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> _Prefix | None:
    """The shared beginning, run through the model; None where sharing would save nothing."""
    if len(prompts) < 2:
        return None
    # these two differ first, if any two do
    low, high = min(map(list, prompts)), max(map(list, prompts))
    # one token of each prompt must remain: its output is the first generated token
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if low[i] != high[i]), limit)
    if length < _WORTH_SHARING:
        return None
    ids = torch.tensor([list(low[:length])], device=input_device(model))
    cache = _run(model, _new_cache(), ids, torch.ones_like(ids), _arange(ids), None)[1]
    layers = _layers(cache)
    return _Prefix(length, [x.keys for x in layers], [x.values for x in layers])


def _start(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    taken: list[int],
    prefix: _Prefix | None,
) -> _Rows:
    """Run the prompts `taken` through the model and pick the first token of each."""
    device, n = input_device(model), len(taken)
    shared = prefix.length if prefix is not None else 0
    rests = [prompts[i][shared:] for i in taken]
    lengths = torch.tensor([len(rest) for rest in rests], device=device)
    longest = max(map(len, rests))
    ids = torch.tensor([[*rest, *[0] * (longest - len(rest))] for rest in rests], device=device)
    places = torch.arange(shared + longest, device=device)
    # padded on the right here, where no token sees the padding, and turned round below
    mask = (places < (shared + lengths)[:, None]).long()
    cache = _new_cache()
    if prefix is not None:
        for i, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), i)
    # only the last token of each row needs its logits [vocabulary]
    last, which = torch.unique(lengths - 1, return_inverse=True)
    logits, cache = _run(model, cache, ids, mask, _arange(ids) + shared, last)
    tokens = logits[torch.arange(n, device=device), which].argmax(-1)
    source = (places - (longest - lengths)[:, None]) % len(places)
    for layer in _layers(cache):
        index = source[:, None, :, None].expand_as(layer.keys)
        layer.keys = layer.keys.gather(2, index)
        layer.values = layer.values.gather(2, index.expand_as(layer.values))
    return _Rows(list(taken), [[] for _ in taken], cache, mask.flip(1), shared + lengths, tokens)


def _advance(model: PreTrainedModel, live: _Rows) -> None:
    """Run the newest token of each row through the model and pick the next."""
    live.mask = torch.cat([live.mask, live.mask.new_ones(len(live.prompts), 1)], dim=1)
    positions = live.lengths[:, None]
    logits, live.cache = _run(model, live.cache, live.tokens[:, None], live.mask, positions, None)
    live.tokens = logits[:, -1].argmax(-1)
    live.lengths = live.lengths + 1


def _finish(
    live: _Rows,
    max_new_tokens: int,
    end_tokens: Collection[int],
    ended: Callable[[list[int]], bool],
) -> dict[int, Decoded]:
    """Append the newest tokens; rows that have ended, by their place in the batch."""
    finished = {}
    for row, (token, ids) in enumerate(zip(live.tokens.tolist(), live.ids, strict=True)):
        if token in end_tokens:
            finished[row] = Decoded(live.prompts[row], ids, False)
            continue
        ids.append(token)
        stopped = ended(ids)
        if stopped or len(ids) >= max_new_tokens:
            finished[row] = Decoded(live.prompts[row], ids, not stopped)
    return finished


def _run(
    model: PreTrainedModel,
    cache: DynamicCache,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, DynamicCache]:
    """Logits [rows, len(keep) or 1, vocabulary] at the places `keep` of `ids` (default: the last).

    Extends `cache` by the keys and values of `ids`.
    """
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions.expand(ids.shape),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1 if keep is None else keep,
    )
    return out.logits, _checked(getattr(out, "past_key_values", None))


def _new_cache() -> DynamicCache:
    from transformers import DynamicCache

    # without a config all layers keep all tokens; a layer with a window would drop those of short
    # rows first, whose padding counts as tokens
    return DynamicCache()


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _checked(cache: DynamicCache | None) -> DynamicCache:
    """`cache`, if it holds keys and values alone."""
    from transformers.cache_utils import DynamicLayer

    layers = [] if cache is None else list(cache.layers)
    if cache is None or not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise BadConfig(
            "This model keeps a state that is no plain keys and values of attention, which batched "
            "generation cannot pad, join and take apart. Evaluate it by likelihood "
            "(salve_lm.tasks.AnswerLikelihood)."
        )
    return cache


def _padded(x: Tensor, length: int, dim: int) -> Tensor:
    """`x` with zeros before it along `dim`, up to `length`."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim=dim)


def _arange(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)[None]
