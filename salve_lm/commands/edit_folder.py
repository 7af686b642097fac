"""`edit` of a language model in a folder: streamed, without loading the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from salve_lm.edits.context import EditContext
from salve_lm.edits.plan import apply_named
from salve_lm.edits.resolve import PlainModel, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import BadConfig, CorruptFile
from salve_lm.language.loading import load_causal_lm
from salve_lm.language.names import is_tied
from salve_lm.task_vectors.folder_plan import HEAD, folder_changes, plan_folder
from salve_lm.task_vectors.record import make_record, plans_to_dicts, write_record
from salve_lm.task_vectors.resident import ResidentGrowth
from salve_lm.task_vectors.weights import FolderWeights
from salve_lm.task_vectors.writer import Written, write_edited

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUT_DTYPES = {"float32": torch.float32}


def edit_folder(
    source: str | Path,
    edits: Sequence[EditSpec],
    out: str | Path,
    *,
    context: EditContext | None = None,
    dtype: str | None = None,
    check_live: bool = False,
    file_digests: bool = False,
    model: Mapping[str, Any] | None = None,
    loaded: PreTrainedModel | None = None,
) -> Written:
    """Write the permanently edited model in folder `source` to the new folder `out`.

    Resolves the edits by a model without values, then streams: resident memory does not depend on
    the size of the model. Layers with other edits than task vectors are held whole, one at a time
    for each thread that writes. `out` has the files of `source` under the same names, with the same
    layout, and `edit.json` (`docs/formats/edited-folder.md`), from which `rebuild_folder` makes it
    again.

    Args:
        source: Hugging Face folder with safetensors weights.
        edits: Applied in order.
        out: Must not exist.
        context: Cache of SAEs and task vectors.
        dtype: `float32` stores changed tensors in it, and says so in `config.json`; that of the
            base when absent.
        check_live: Load the result with transformers before it gets its name, and compare it, bit
            for bit, with the live edit. Takes memory for two models.
        file_digests: Record the plain SHA-256 of every file too, for comparison with those that
            others publish. Reads everything once more.
        model: How to build the network again, kept in the record.
        loaded: The model of `source` in memory, for edits that look at its weights to say what they
            do.

    Raises:
        BadConfig: no edits, or an unknown dtype.
        CorruptFile: the written model is not the live edit (with `check_live`).
        SalveError: see `plan_folder` and `write_edited`.
    """
    if not edits:
        raise BadConfig("Nothing to export: give at least one edit.")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise BadConfig(f"No output dtype {dtype!r}: give float32, or none for that of the base.")
    wanted = None if dtype is None else OUTPUT_DTYPES[dtype]
    context = context or EditContext()
    base = FolderWeights(source)
    plan = plan_folder(base, edits, context, loaded)
    titled = [(p.spec.title, p.ops) for p in plan.plans]
    resident = ResidentGrowth()

    def finish(folder: Path, written: Written) -> None:
        record = make_record(
            base.files, written, plans_to_dicts(plan, context), plan.tied,
            dtype=wanted, model=model, file_digests_in=folder if file_digests else None,
        )  # fmt: skip
        record["memory"] = {"peak_growth_mb": resident.peak_mb()}
        if check_live:
            record["check"] = compare_with_live(folder, source, edits, context, dtype)
        write_record(folder, record)

    changes = folder_changes(titled, plan.tied, base, wanted)
    return write_edited(
        base.files, changes.deltas, out, replaced=changes.replaced, dtype=wanted, finish=finish
    )


def compare_with_live(
    written: str | Path,
    base: str | Path,
    edits: Sequence[EditSpec],
    context: EditContext | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Load the written model with transformers, and the base with the live edit; compare the bits.

    Args:
        written: the edited folder.
        base: the unedited one.
        edits: that were applied.
        context: cache of SAEs and task vectors.
        dtype: `float32` where the changed tensors were stored so; the live edit is then one of the
            base loaded in float32.

    Returns:
        `matches_live` and `checked_on` in words.

    Raises:
        CorruptFile: they differ.
        SalveError: the written model does not load whole.
    """
    result = load_causal_lm(written, dtype="auto")
    live = load_causal_lm(base, dtype="auto" if dtype is None else "float32")
    plans = plan_edits(edits, PlainModel(live, HEAD), context)
    state = live.state_dict()
    edited = state | apply_named(state, [p.named for p in plans]).tensors
    found = result.state_dict()
    tied = is_tied(live.config)
    names = [n for n in edited if not (tied and n == f"{HEAD}.weight")]
    differing = [n for n in names if n not in found or not torch.equal(found[n], edited[n])]
    if differing or found.keys() != state.keys():
        raise CorruptFile(
            written, f"{len(differing)} tensors differ from the live edit: {differing[:5]}",
            "Please report this.",
        )  # fmt: skip
    return {"matches_live": True, "checked_on": f"all {len(names)} tensors, loaded again"}
