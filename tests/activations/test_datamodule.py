from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from salve_lm.activations import ActivationBatch, ActivationData
from salve_lm.errors import BadConfig, CorruptFile, MissingStore, NameNotFound, StaleStore
from tests.activations.tiny import D_IN, TinyData, TinyStudied, pooled


class Watcher(pl.LightningModule):
    """Keeps every batch it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[ActivationBatch]] = {"train": [], "val": [], "predict": []}

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch)
        return self.weight * batch.x.sum()

    def validation_step(self, batch: ActivationBatch, batch_idx: int) -> None:
        self.seen["val"].append(batch)

    def predict_step(self, batch: ActivationBatch, batch_idx: int) -> None:
        self.seen["predict"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**quiet, **options})


def fit(data: ActivationData, **options: Any) -> Watcher:
    watcher = Watcher()
    trainer(**options).fit(watcher, datamodule=data)
    return watcher


def on_the_fly(**options: Any) -> ActivationData:
    return ActivationData(
        model=TinyStudied(), source=TinyData(), **{"batch_size": 5, "seed": 3, **options}
    )


def stored(path: Path, **options: Any) -> ActivationData:
    return on_the_fly(store=str(path / "store"), **options)


def same(a: list[ActivationBatch], b: list[ActivationBatch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one.x, other.x)
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.sample, other.sample)
        assert one.n_global == other.n_global


def test_store_and_on_the_fly_give_the_same_batches(tmp_path: Path) -> None:
    from_store, live = fit(stored(tmp_path)), fit(on_the_fly())
    for split in ("train", "val"):
        same(from_store.seen[split], live.seen[split])
    assert [b.n_global for b in live.seen["train"]] == [5, 5, 5, 5, 3] * 2
    first, second = live.seen["train"][:5], live.seen["train"][5:]
    for epoch in (first, second):
        assert sorted(torch.cat([b.sample for b in epoch]).tolist()) == list(range(23))
    assert [b.sample.tolist() for b in first] != [b.sample.tolist() for b in second]
    images, labels = TinyData().tensors("train")
    x = pooled(TinyStudied(), images)
    for batch in live.seen["train"]:
        torch.testing.assert_close(batch.x, x[batch.sample])
        assert torch.equal(batch.label, labels[batch.sample])
    in_order = torch.cat([b.sample for b in live.seen["val"][:3]])
    assert torch.equal(in_order, torch.arange(11))


def test_worker_processes_change_nothing() -> None:
    same(fit(on_the_fly(num_workers=2)).seen["train"], fit(on_the_fly()).seen["train"])


def test_the_order_depends_on_the_seed_alone() -> None:
    pl.seed_everything(1)
    one = fit(on_the_fly())
    pl.seed_everything(2)
    same(one.seen["train"], fit(on_the_fly()).seen["train"])
    other = fit(on_the_fly(seed=4)).seen["train"]
    assert other[0].sample.tolist() != one.seen["train"][0].sample.tolist()


def test_loaders_leave_the_global_random_state_alone() -> None:
    data = on_the_fly()
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_positions_on_the_fly_and_from_the_store(tmp_path: Path) -> None:
    live = fit(on_the_fly(site="norm:positions", batch_size=40), max_epochs=1)
    assert [b.n_global for b in live.seen["train"]] == [32] * 11 + [16]  # 2 images of 16 positions
    x = stored(tmp_path, site="norm:positions", batch_size=40)
    from_store = fit(x, max_epochs=1)
    assert [b.n_global for b in from_store.seen["train"]] == [40] * 9 + [8]
    assert sorted(torch.cat([b.sample for b in from_store.seen["train"]]).tolist()) == sorted(
        torch.cat([b.sample for b in live.seen["train"]]).tolist()
    )
    for image in range(23):
        rows = [
            torch.cat([b.x[b.sample == image] for b in run.seen["train"]])
            for run in (live, from_store)
        ]
        # the positions of one image come in any order
        torch.testing.assert_close(*(r.sort(dim=0).values for r in rows))


def test_harvests_once_then_reads(tmp_path: Path) -> None:
    fit(stored(tmp_path), max_epochs=1)
    index = tmp_path / "store" / "index.json"
    written = index.stat().st_mtime_ns
    again = stored(tmp_path)
    fit(again, max_epochs=1)
    assert index.stat().st_mtime_ns == written
    assert again.model.model.after.runs == 0


def test_a_store_alone(tmp_path: Path) -> None:
    whole = fit(stored(tmp_path))
    alone = ActivationData(store=str(tmp_path / "store"), batch_size=5, seed=3)
    same(fit(alone).seen["train"], whole.seen["train"])
    assert alone.d_in == D_IN
    assert alone.class_names == ["ant", "bee", "cat"]
    assert alone.describe("train", 4) == "train/4"


def test_provenance_and_descriptions(tmp_path: Path) -> None:
    live, from_store = on_the_fly(), stored(tmp_path)
    for data in (live, from_store):
        data.prepare_data()
        data.setup("predict")
    assert live.provenance("val") == from_store.provenance("val")
    assert live.provenance("val").keys() == {"backbone", "site", "data", "split"}
    assert live.provenance("val")["data"] == TinyData().fingerprint("val")
    assert live.describe("train", 4) == "train/image-4.png"
    assert live.class_names == from_store.class_names == ["ant", "bee", "cat"]
    assert live.d_in == from_store.d_in == D_IN


@pytest.mark.parametrize("split", ["train", "val"])
def test_predict_runs_over_any_split_in_order(tmp_path: Path, split: str) -> None:
    for data in (on_the_fly(), stored(tmp_path)):
        data.predict_split = split  # type: ignore[assignment]
        watcher = Watcher()
        trainer().predict(watcher, datamodule=data, return_predictions=False)
        samples = torch.cat([b.sample for b in watcher.seen["predict"]])
        assert torch.equal(samples, torch.arange({"train": 23, "val": 11}[split]))


def test_the_network_is_in_no_checkpoint(tmp_path: Path) -> None:
    t = trainer(max_epochs=1)
    watcher = Watcher()
    t.fit(watcher, datamodule=on_the_fly())
    t.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {"weight"}
    assert "conv.weight" not in str(saved)


def test_limits_and_overfitting() -> None:
    limited = fit(on_the_fly(), limit_train_batches=2, limit_val_batches=2)
    train, val = limited.seen["train"], limited.seen["val"]
    whole = fit(on_the_fly()).seen["train"]
    same(train, [*whole[:2], *whole[5:7]])
    assert [b.sample.tolist() for b in val[:2]] == [b.sample.tolist() for b in val[2:]]
    overfit = fit(on_the_fly(), overfit_batches=1).seen["train"]
    assert [b.sample.tolist() for b in overfit] == [[0, 1, 2, 3, 4]] * 2


def test_loaders_made_anew_each_epoch_go_on_with_the_order() -> None:
    same(
        fit(on_the_fly(), reload_dataloaders_every_n_epochs=1).seen["train"],
        fit(on_the_fly()).seen["train"],
    )


def test_an_empty_share_on_the_fly() -> None:
    data = on_the_fly()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.world, loader.sampler.rank = 8, 0
    batches = [data.on_after_batch_transfer(b, 0) for b in loader]
    assert [len(b.x) for b in batches] == [0] * 5
    assert all(b.x.shape == (0, D_IN) and b.n_global in (5, 3) for b in batches)


def test_missing_store() -> None:
    with pytest.raises(MissingStore, match="Give `model` and `source`"):
        fit(ActivationData(store="nowhere"))


def test_neither_store_nor_model() -> None:
    with pytest.raises(BadConfig, match="needs a `store`, or a `model` and a `source`"):
        ActivationData(source=TinyData())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": TinyStudied(seed=1)}, r"backbone \(made from weights"),
        ({"source": TinyData(seed=1)}, r"data \(other samples or another transform in split 'tr"),
        ({"site": "fc"}, r"site \(made at 'fc:input', now 'fc:output'\)"),
        ({"dtype": "float16"}, r"dtype \(stored as float32, now float16\)"),
        ({"splits": ("train", "test")}, r"data \(has no split 'test'\)"),
    ],
)
def test_stale_store(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    fit(stored(tmp_path), max_epochs=1)
    options = {"model": TinyStudied(), "source": TinyData(), **change}
    with pytest.raises(StaleStore, match=f"differs in: {part}.*Remove it") as e:
        fit(ActivationData(store=str(tmp_path / "store"), **options))
    parts = ("backbone (", "site (", "data (", "dtype (")
    assert sum(p in str(e.value) for p in parts) == 1


def test_stale_with_the_model_alone(tmp_path: Path) -> None:
    fit(stored(tmp_path), max_epochs=1)
    store = str(tmp_path / "store")
    fit(ActivationData(store=store, model=TinyStudied()), max_epochs=1)
    with pytest.raises(StaleStore, match="differs in: backbone"):
        fit(ActivationData(store=store, model=TinyStudied(seed=1)))


def test_something_else_at_the_path(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(CorruptFile, match="not an activation store"):
        fit(stored(tmp_path))


def test_a_split_that_was_not_harvested(tmp_path: Path) -> None:
    data = stored(tmp_path)
    fit(data, max_epochs=1)
    with pytest.raises(BadConfig, match=r"not 'test'\. Harvest a new one"):
        data.test_dataloader()
    data = on_the_fly(store=str(tmp_path / "other"), splits=("train", "val", "test"))
    fit(data, max_epochs=1)
    assert sum(len(b.x) for b in data.test_dataloader()) == 7


def test_bad_options() -> None:
    with pytest.raises(BadConfig, match="batch_size must be at least 1"):
        on_the_fly(batch_size=0)
    with pytest.raises(NameNotFound, match="Did you mean 'pooled'"):
        fit(on_the_fly(site="poold"))
    with pytest.raises(BadConfig, match=r"after ActivationData\.setup"):
        _ = on_the_fly().d_in
