"""Effects of an edit over several autoencoders: mean, spread, and what that says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salve_lm.commands.robustness_effects import ITSELF
from salve_lm.commands.robustness_saes import METRICS, StudiedSAE

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"  # the row of the mean over classes
EFFECTS = ("target", "others", "others_lost", "flip_median")
CONTROLS = {
    "random_latent": "a random latent in its place, at the same strength",
    "permuted": "its c with channels shuffled, at the same strength",
}


def summarise_effects(effects: pd.DataFrame, removed_at_most: float) -> pd.DataFrame:
    """One row a (setting, edit, control, class): effects over autoencoders.

    Draws of a control are averaged for each autoencoder first, and so are the classes for the rows
    of class `all`. `removed` counts the autoencoders whose held-out target accuracy is at most
    `removed_at_most`; standard deviations divide by n - 1.
    """
    import pandas as pd

    keys = ["setting", "edit", "control"]
    each = effects.assign(others_lost=effects["others_before"] - effects["others"])
    kept = [*EFFECTS, "target_before", "others_before", "alpha"]
    each = each.groupby([*keys, "class", "sae"], sort=False)[kept].mean().reset_index()
    pooled = each.groupby([*keys, "sae"], sort=False)[kept].mean().reset_index()
    rows = []
    for table in (each, pooled.assign(**{"class": ALL, "alpha": float("nan")})):
        for key, mine in table.groupby([*keys, "class"], sort=False):
            row = dict(zip([*keys, "class"], key, strict=True)) | {
                "saes": len(mine),
                "alpha": mine["alpha"].iloc[0],
                "target_before": mine["target_before"].mean(),
                "others_before": mine["others_before"].mean(),
                "removed": int((mine["target"] <= removed_at_most + 1e-9).sum()),
            }
            for name in EFFECTS:
                values = mine[name]
                finite = values.abs().max() < float("inf")  # a threshold may be infinite
                row |= {
                    f"{name}_mean": values.mean(),
                    f"{name}_sd": values.std() if finite else float("nan"),
                    f"{name}_min": values.min(),
                    f"{name}_max": values.max(),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def sae_table(
    groups: Mapping[str, Sequence[StudiedSAE]], effects: pd.DataFrame
) -> list[dict[str, Any]]:
    """One row an autoencoder: settings, metrics, and each edit's effect, mean over the classes."""
    own = effects[effects["control"] == ITSELF]
    rows = []
    for setting, saes in groups.items():
        for sae in saes:
            row = {"sae": sae.name, "setting": setting, "seed": sae.seed}
            row |= sae.settings | {name: sae.metrics.get(name) for name in METRICS}
            for edit, mine in own[own["sae"] == sae.name].groupby("edit", sort=False):
                lost = (mine["others_before"] - mine["others"]).mean()
                row |= {
                    f"{edit}: target": mine["target"].mean(),
                    f"{edit}: others_lost": lost,
                    f"{edit}: flip_median": mine["flip_median"].mean(),
                }
            rows.append(row)
    return rows


def in_words(
    groups: Mapping[str, Sequence[StudiedSAE]],
    summary: pd.DataFrame,
    similarities: Mapping[str, Mapping[str, Any]],
    suppressing: Sequence[str],
    removed_at_most: float,
) -> str:
    """What the study found, as Markdown."""
    parts = ["# Robustness\n"]
    for setting, saes in groups.items():
        n = len(saes)
        noun = "autoencoder" if n == 1 else "autoencoders that differ in their seeds"
        title = f"{n} {noun}"
        parts.append(f"## {title}" + ("" if setting == ALL else f": {setting}") + "\n")
        parts.append(_metrics(saes) + "\n")
        mine = summary[summary["setting"] == setting]
        for edit in dict.fromkeys(mine["edit"]):
            rows = mine[mine["edit"] == edit]
            parts.append(_effect(edit, rows, edit in suppressing, removed_at_most) + "\n")
        if similarities.get(setting):
            parts.append(_alike(similarities[setting]) + "\n")
    return "\n".join(parts)


def _metrics(saes: Sequence[StudiedSAE]) -> str:
    said = []
    for name, words, factor, digits in (
        ("explained_variance", "explained variance", 1, 4),
        ("l0", "L0", 1, 1),
        ("dead_fraction", "dead latents (%)", 100, 1),
    ):
        values = [factor * s.metrics[name] for s in saes if name in s.metrics]
        if values:
            said.append(f"{words} {_range(values, digits)}")
    return f"Held out: {', '.join(said)}." if said else "Their metrics are not known."


def _effect(edit: str, rows: pd.DataFrame, suppresses: bool, removed_at_most: float) -> str:
    own = rows[rows["control"] == ITSELF]
    whole = own[own["class"] == ALL].iloc[0]
    classes = own[own["class"] != ALL]
    n = int(whole["saes"])
    said = [
        f"**{edit}**, one strength for all of them, mean over {len(classes)} classes: held-out "
        f"accuracy of the edited class {_pct(whole['target_before'])} → "
        f"{_pct(whole['target_mean'])} %{_spread(whole, 'target', n)}, of the others "
        f"{_pct(whole['others_before'])} → {_pct(whole['others_mean'])} %"
        f"{_spread(whole, 'others', n)}."
    ]
    if suppresses:
        limit = f"at most {100 * removed_at_most:g} %"
        gone = classes[classes["removed"] == classes["saes"]]
        split = classes[(classes["removed"] > 0) & (classes["removed"] < classes["saes"])]
        whole_words = f"{len(gone)} of {len(classes)} classes fall to {limit} with "
        said.append(whole_words + (f"every one of {n} seeds" if n > 1 else "it"))
        if len(split):
            some = ", ".join(
                f"{r['class']} with {r['removed']} of {r['saes']}" for r in split.to_dict("records")
            )
            said[-1] += f"; the seeds disagree on {some}"
        never = len(classes) - len(gone) - len(split)
        said[-1] += f"; {never} with none." if never and n > 1 else "."
    for control, words in CONTROLS.items():
        other = rows[(rows["control"] == control) & (rows["class"] == ALL)]
        if len(other):
            row = other.iloc[0]
            said.append(
                f"With {words}: {_pct(row['target_mean'])} %{_spread(row, 'target', n)}, others "
                f"{_pct(row['others_mean'])} %."
            )
    flips = classes[classes["flip_median_mean"].notna()]
    finite = flips[(flips["flip_median_max"] < float("inf")) & (flips["flip_median_mean"] > 0)]
    if len(finite) and n > 1:
        varies = (finite["flip_median_sd"] / finite["flip_median_mean"]).mean()
        said.append(
            "The median class-flip threshold varies between seeds by "
            f"{_pct(varies, 0)} % (sd over mean, {len(finite)} of {len(flips)} classes)."
        )
    return " ".join(said)


def _alike(found: Mapping[str, Any]) -> str:
    said = [
        f"Decoder rows: the most similar one of another seed has a cosine of "
        f"{found['decoder']:.3f} on average (random directions: {found['decoder_random']:.3f})."
    ]
    for ranking in ("dominant", "selective"):
        of = found[ranking]
        said.append(
            f"|c| of a class's {ranking} latent: cosine {of['same_class']:.3f} with that of another"
            f" seed, {of['other_class']:.3f} with another class's, "
            f"{of['random_latents']:.3f} between random latents; most like the same class's in "
            f"{_pct(of['recognised'], 0)} % of the pairs."
        )
    return " ".join(said)


def _spread(row: Any, name: str, n: int) -> str:
    if n < 2:
        return ""
    low, high = _pct(row[f"{name}_min"]), _pct(row[f"{name}_max"])
    return f" (sd {_pct(row[f'{name}_sd'])}, {low} to {high})"


def _range(values: Sequence[float], digits: int) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _pct(share: float, digits: int = 1) -> str:
    return "–" if share != share else f"{100 * share:.{digits}f}"
