"""How much of an injected task vector its projection keeps, against chance: `projection.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import salve_lm
from salve_lm.edits.context import EditContext
from salve_lm.edits.lookup import ModelIndex
from salve_lm.edits.task_vector import TaskVectorInjection
from salve_lm.language.names import decoder_prefix, layer_of
from salve_lm.task_vectors.energy import SAMPLES, RetainedEnergy, account
from salve_lm.task_vectors.weights import GivenWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salve_lm.edits.add_task_vector import AddTaskVector
    from salve_lm.tasks.base import EvaluationTask

FORMAT, VERSION = "salve-lm projection", 1
FILE = "projection.json"
TOKENS = 4096
"""Tokens whose activations give the principal components."""


def projection_energies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    edit: TaskVectorInjection,
    task: EvaluationTask,
    *,
    device: torch.device,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """What `projection.json` holds: every projected tensor and layer beside its nulls (METHODS 6).

    The nulls are uniformly random subspaces of the same rank, spans of as many random live decoder
    rows, and the principal components of the layer's activations on the prompts of `task`.

    Args:
        model: unedited.
        tokenizer: of the prompts; without one the principal components are left out.
        edit: whose variant is `projected` (rescaling changes none of these figures).
        task: its first prompts give the activations.
        device: where the model runs for them; it ends where it was.
        samples: random subspaces, and sets of decoder rows, for each tensor.
        seed: of the draws.

    Raises:
        SalveError: see `TaskVectorInjection.resolve_model`.
    """
    context = EditContext()
    ops: Any = edit.resolve_model(model, ModelIndex(model), context).ops
    layers = sorted({n for op in ops if (n := layer_of(op.name, model.config)) is not None})
    decoders = {n: context.sae(str(edit.sae).replace("{layer}", str(n))).decoder() for n in layers}
    moments: Mapping[int, Tensor] = {}
    if tokenizer is not None:
        moments = second_moments(model, tokenizer, task, layers, device)
    base = GivenWeights(dict(model.named_parameters()), model.config)
    found = account(
        ops, base, decoders=decoders, second_moments=moments, samples=samples, seed=seed
    )
    totals = [e for e in found if e.name.startswith("layer ")]
    energy = sum(e.energy for e in totals)
    tensors = [e for e in found if not e.name.startswith("layer ")]
    return {
        "format": FORMAT,
        "version": VERSION,
        "layers": layers,
        "samples": samples,
        "seed": seed,
        "retained_energy": sum(e.retained for e in totals) / energy if energy else 0.0,
        # what random subspaces of the same ranks keep on average
        "k_over_d": sum(e.energy * e.expected for e in totals) / energy if energy else 0.0,
        "untouched": _untouched(edit, ops, model, context),
        "totals": [_plain(e) for e in totals],
        "tensors": [_plain(e) for e in tensors],
        "versions": {"salve_lm": salve_lm.__version__, "torch": str(torch.__version__)},
    }


@torch.no_grad()
def second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    layers: Sequence[int],
    device: torch.device,
) -> dict[int, Tensor]:
    """Layer -> E[x x^T] of its output over the first tokens of `task`, float64 [d, d].

    Empty where the task's batches have no `input_ids`.
    """
    sums: dict[int, Tensor] = {}
    counted, kept = 0, torch.zeros(0)

    def hook(n: int) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            x = (output if isinstance(output, Tensor) else output[0])[kept].cpu().double()
            sums[n] = sums.get(n, 0) + x.T @ x

        return add

    prefix = decoder_prefix(model.config)
    home = model.device
    handles = [model.get_submodule(f"{prefix}.{n}").register_forward_hook(hook(n)) for n in layers]
    try:
        nn.Module.to(model, device)
        items = iter(task.items(tokenizer))
        while counted < TOKENS and (some := list(islice(items, task.batch_size))):
            batch = task.collate(some, tokenizer)
            if "input_ids" not in batch:
                break
            ids = batch["input_ids"].to(device)
            mask = batch.get("attention_mask")
            mask = ids != tokenizer.pad_token_id if mask is None else mask.to(device)
            kept = mask.bool()
            model(input_ids=ids, attention_mask=kept.long(), use_cache=False, logits_to_keep=1)
            counted += int(kept.sum())
    finally:
        for handle in handles:
            handle.remove()
        nn.Module.to(model, home)
    return {n: total / counted for n, total in sums.items()}


def _untouched(
    edit: TaskVectorInjection,
    ops: Sequence[AddTaskVector],
    model: PreTrainedModel,
    context: EditContext,
) -> list[str]:
    """Tensors that tau changes and no projection applies to."""
    raw: Any = dataclasses.replace(edit, variant="raw")
    whole = raw.resolve_model(model, ModelIndex(model), context).ops
    projected = {op.name for op in ops}
    return [op.name for op in whole if op.name not in projected]


def _plain(e: RetainedEnergy) -> dict[str, Any]:
    return {
        "name": e.name,
        "rank": e.rank,
        "width": e.width,
        "energy": e.energy,
        "retained_energy": e.rho,
        "k_over_d": e.expected,
        "ratio": e.ratio,
        "random_subspace": e.random_subspace._asdict(),
        "random_latents": None if e.random_latents is None else e.random_latents._asdict(),
        "principal_components": e.principal_components,
    }
