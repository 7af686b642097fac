"""A language model under the editing contract: edited while validated, restored, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from salve_lm.callbacks.weight_editing import WeightEditing
from salve_lm.edits import ShrinkClassRow
from salve_lm.edits.export import export
from salve_lm.errors import EditConflict
from salve_lm.modules.lora import LoraOptions
from tests.language.tiny_models import BOS, CONFIGS, save_model
from tests.modules.tiny_fits import data, model, trainer

FAMILIES = list(CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_validated_edited_and_restored(family: str, tmp_path: Path, text: str) -> None:
    """One row of the unembedding at zero, live and written, against doing so by hand."""
    save_model(tmp_path / "base", family)
    module = model(tmp_path / "base")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    (plain, *_) = trainer().validate(module, datamodule=data(text), verbose=False)
    spec = ShrinkClassRow(target_class=100, alpha=1.0, allow_tied=True)
    edit = WeightEditing([spec])
    (edited, *_) = trainer(edit).validate(module, datamodule=data(text), verbose=False)
    assert edited["all/loss"] != plain["all/loss"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    exported = export(module, [spec], tmp_path / "edited")
    by_hand = model(tmp_path / "base")
    with torch.no_grad():
        by_hand.model.get_output_embeddings().weight[100] = 0
    (own, *_) = trainer().validate(by_hand, datamodule=data(text), verbose=False)
    assert edited == {**own, **{k: v for k, v in edited.items() if k.startswith("edit/")}}
    written = load_file(exported.path / "model.safetensors")
    for name, tensor in by_hand.model.state_dict().items():
        assert torch.equal(written[name], tensor), name


def test_tied_weights_are_refused_unless_asked_for(llama: Path, text: str) -> None:
    edit = WeightEditing([ShrinkClassRow(target_class=BOS)])
    with pytest.raises(EditConflict, match="allow_tied"):
        trainer(edit).validate(model(llama), datamodule=data(text))


@pytest.mark.parametrize("lora", [None, LoraOptions(r=2)], ids=["full", "lora"])
def test_checkpoints_of_an_edited_fit_hold_the_originals(
    lora: LoraOptions | None, tmp_path: Path, text: str
) -> None:
    save_model(tmp_path / "base", "llama")
    edit = WeightEditing([ShrinkClassRow(target_class=100, alpha=1.0)])
    keep = ModelCheckpoint(
        tmp_path / "c", save_last=True, save_on_train_epoch_end=False, monitor="all/loss"
    )
    module = model(tmp_path / "base", lora=lora)
    trainer(edit, keep).fit(module, datamodule=data(text))
    saved = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    assert not torch.equal(module.model.get_output_embeddings().weight[100], torch.zeros(16))
