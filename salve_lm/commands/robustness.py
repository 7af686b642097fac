"""`robustness`: does an edit do the same whatever the autoencoder's seed, width or sparsity?

Layout of the folder:

    robustness.csv, .json   one row an (autoencoder, edit, class, control, draw)
    summary.csv, .json      one row a (setting, edit, control, class): mean and spread over seeds
    saes.csv, .json         one row an autoencoder: settings, metrics, mean effect
    features.csv, .json     one row an (autoencoder, class, ranking): the class's first latent
    similarity.json         setting -> how alike the features of its seeds are
    robustness.svg, .md     the plot, and what was found in words
    features/SAE/           the feature table of each autoencoder
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from salve_lm.activations.datamodule import ActivationData
from salve_lm.activations.key import hash_backbone
from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.callbacks.tables import write_table
from salve_lm.commands.discover import find_features
from salve_lm.commands.inputs import check_activations
from salve_lm.commands.robustness_effects import Classifier, Rules, effects_of
from salve_lm.commands.robustness_plot import robustness_plot
from salve_lm.commands.robustness_saes import (
    StudiedSAE,
    check_made_from,
    feature_rows,
    find_saes,
    group_by_setting,
    similarity,
)
from salve_lm.commands.robustness_summary import in_words, sae_table, summarise_effects
from salve_lm.commands.sweep import SPLITS, check_choice, group_by_name
from salve_lm.commands.swept import direction_of
from salve_lm.edits import EditContext, EditSpec
from salve_lm.errors import BadConfig
from salve_lm.evaluation import Evaluator
from salve_lm.features import FeatureTable, class_index
from salve_lm.modules.sae_group import SAEGroupTraining

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def robustness(
    trainer: Trainer,
    datamodule: LightningDataModule,
    edits: list[EditSpec],
    out: str,
    model: LightningModule | None = None,
    saes: str | None = None,
    classes: list[str] | None = None,
    rules: Rules | None = None,
    removed_at_most: float = 0.05,
    ckpt_path: str | None = None,
) -> None:
    """Run `SalveTrainer.robustness`; see there."""
    rules = Rules() if rules is None else rules
    check_choice(rules.target_at_most, rules.others_drop, rules.margin)
    if rules.draws < 1 or not 0 <= removed_at_most <= 1:
        raise BadConfig(
            f"draws ({rules.draws}) is at least 1 (leave random_latent out of `controls` for none),"
            f" and removed_at_most ({removed_at_most}) a share."
        )
    data = check_activations(datamodule, "robustness")
    named = _edits(edits)
    check_writable_target(out)
    folder = saes if saes is not None else _train(trainer, model, data, ckpt_path)
    if folder is None:
        return
    found = find_saes(folder)
    if data.model is None or data.source is None:
        raise BadConfig(
            "robustness edits the network whose activations the data are: give ActivationData its "
            "`model` and its `source`."
        )
    check_made_from(found, hash_backbone(data.model))
    tables: dict[str, FeatureTable] = {}
    for sae in found:  # on every rank: each reads its share of the samples
        read = find_features(trainer, data, sae.path)
        if read is not None:
            tables[sae.name] = read[0]
    if not trainer.is_global_zero:
        return
    with atomic_folder(out) as target:
        words = _study(trainer, data, named, target, found, tables, classes, rules, removed_at_most)
    _show(words, out)


def _study(
    trainer: Trainer,
    data: ActivationData,
    edits: Mapping[str, EditSpec],
    folder: Path,
    saes: Sequence[StudiedSAE],
    tables: Mapping[str, FeatureTable],
    classes: Sequence[str] | None,
    rules: Rules,
    removed_at_most: float,
) -> str:
    """Measure and write everything; the words."""
    import pandas as pd
    from rich.progress import track

    contexts = {}
    for name, table in tables.items():
        table.save(folder / "features" / name)
        path = next(s.path for s in saes if s.name == name)
        contexts[name] = EditContext(sae=path, features=folder / "features" / name)
    classifier = _classifier(trainer, data)
    for name in classes or []:
        class_index(name, classifier.class_names)
    groups = group_by_setting(saes)
    rows: list[dict[str, Any]] = []
    for setting, same in track(groups.items(), description="Editing", total=len(groups)):
        found, left_out = effects_of(
            same, edits, classes or classifier.class_names, classifier, contexts, rules
        )
        rows += [{"setting": setting, **row} for row in found]
        for message in left_out:
            logger.warning(message)
    if not rows:
        raise BadConfig("No edit is defined for any class with any autoencoder; see the warnings.")
    effects = pd.DataFrame(rows)
    summary = summarise_effects(effects, removed_at_most)
    # any context opens all of them
    shared = next(iter(contexts.values()))
    similarities = {k: similarity(same, tables, shared, rules.seed) for k, same in groups.items()}
    suppressing = [name for name, spec in edits.items() if direction_of(spec) == "suppress"]
    words = in_words(groups, summary, similarities, suppressing, removed_at_most)
    _write(folder, effects, summary, sae_table(groups, effects), similarities, words)
    write_table(folder, "features", [r for s in saes for r in feature_rows(s, tables[s.name])])
    return words


def _write(
    folder: Path,
    effects: pd.DataFrame,
    summary: pd.DataFrame,
    saes: Sequence[Mapping[str, Any]],
    similarities: Mapping[str, Any],
    words: str,
) -> None:
    write_table(folder, "robustness", effects.to_dict("records"))
    write_table(folder, "summary", summary.to_dict("records"))
    write_table(folder, "saes", saes)
    (folder / "similarity.json").write_text(json.dumps(similarities, indent=1) + "\n")
    (folder / "robustness.md").write_text(words, encoding="utf-8")
    (folder / "robustness.svg").write_text(robustness_plot(effects), encoding="utf-8")


def _train(
    trainer: Trainer, model: LightningModule | None, data: ActivationData, ckpt_path: str | None
) -> str | None:
    """Train the sweep; the folder of its autoencoders, or None where it was stopped."""
    if not isinstance(model, SAEGroupTraining):
        raise BadConfig(
            "robustness needs autoencoders: as `saes` the folder of trained ones, or as `model` a "
            "salve_lm.modules.sae_group.SAEGroupTraining whose sweep is trained first, such as "
            "`sweep: {seed: [0, 1, 2]}`."
        )
    out = model.hparams.get("out")
    if out is None:
        raise BadConfig("The model needs an `out`, the folder that its autoencoders are kept in.")
    if Path(out).exists() and ckpt_path is None:
        raise BadConfig(
            f"{out} holds autoencoders already. Study these with --saes {out}, or choose another "
            "folder with --model.init_args.out."
        )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return str(out) if trainer.state.finished else None


def _classifier(trainer: Trainer, data: ActivationData) -> Classifier:
    studied, source = data.model, data.source
    if studied is None or source is None:
        raise BadConfig("The data need a `model` and a `source`.")
    device = trainer.strategy.root_device
    studied.to(device)
    evaluators = {str(s): Evaluator(studied, source, s, device) for s in SPLITS}
    return Classifier(studied, evaluators, list(source.class_names))


def _edits(edits: Sequence[EditSpec]) -> dict[str, EditSpec]:
    named = group_by_name(edits)
    for name, variants in named.items():
        if len(variants) > 1:
            raise BadConfig(f"Two edits named {name!r}: give each a `name` of its own.")
        if variants[0].target_class is not None:
            raise BadConfig(
                f"{name!r} names a class. Leave `target_class` out: the edit is repeated for every "
                "class, and `classes` says which."
            )
    return {name: variants[0] for name, variants in named.items()}


def _show(words: str, out: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(words))
    console.print(f"Written to {out}", markup=False)
