from __future__ import annotations

from pathlib import Path

import pytest
import torch

from salve_lm.activations.harvest import harvest
from salve_lm.activations.key import check_fresh, make_key
from salve_lm.activations.sites import parse_site
from salve_lm.activations.store import ActivationStore
from salve_lm.errors import (
    BadConfig,
    EmptyClass,
    NameNotFound,
    NotFinite,
    OutputExists,
    StaleStore,
)
from tests.activations.tiny import TinyStudied, pooled, ready_data


def quiet_harvest(out: Path, **options: object) -> ActivationStore:
    options = {"studied": TinyStudied(), "data": ready_data(), "site": "pooled", **options}
    return harvest(out=out, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
@pytest.mark.parametrize("shard_rows", [1, 7, 23, 1000])
def test_equals_the_network_written_out(tmp_path: Path, batch_size: int, shard_rows: int) -> None:
    studied, data = TinyStudied(), ready_data()
    store = quiet_harvest(tmp_path / "s", batch_size=batch_size, shard_rows=shard_rows)
    for split in ("train", "val"):
        images, labels = data.tensors(split)  # type: ignore[arg-type]
        rows = store.gather(split, torch.arange(len(labels)))
        torch.testing.assert_close(rows.x, pooled(studied, images))
        assert torch.equal(rows.label, labels)
        assert torch.equal(rows.sample, torch.arange(len(labels)))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_dtypes(tmp_path: Path, dtype: str) -> None:
    store = quiet_harvest(tmp_path / "s", dtype=dtype, shard_rows=10)
    exact = pooled(TinyStudied(), ready_data().tensors("train")[0])
    rows = store.gather("train", torch.arange(23))
    assert rows.x.dtype == torch.float32
    torch.testing.assert_close(rows.x, exact.to(getattr(torch, dtype)).float())
    assert store.key["dtype"] == dtype


def test_positions_become_rows(tmp_path: Path) -> None:
    store = quiet_harvest(tmp_path / "s", site="norm:positions", shard_rows=50)
    assert (store.samples("val"), store.rows("val")) == (11, 11 * 16)
    rows = store.gather("val", torch.arange(11 * 16))
    assert torch.equal(rows.sample, torch.arange(11).repeat_interleave(16))
    assert torch.equal(rows.label, (torch.arange(11) % 3).repeat_interleave(16))
    means = rows.x.clamp(min=0).view(11, 16, -1).mean(1)
    torch.testing.assert_close(means, pooled(TinyStudied(), ready_data().tensors("val")[0]))


def test_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    studied = TinyStudied()
    studied.model.train()
    studied.model.norm.eval()
    before = {k: v.clone() for k, v in studied.model.state_dict().items()}
    random = torch.get_rng_state()
    quiet_harvest(tmp_path / "s", studied=studied)
    assert studied.model.training and studied.model.drop.training
    assert not studied.model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in studied.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert studied.model.after.runs == 0  # the pass ends at the site


def test_a_progress_bar_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harvest(TinyStudied(), ready_data(), "pooled", tmp_path / "s")
    shown = capsys.readouterr().err
    assert "harvest train" in shown and "harvest val" in shown and "23/23" in shown


def test_nan_names_site_and_sample(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"'fc:input' \(train/image-13\.png\)"):
        quiet_harvest(tmp_path / "s", data=ready_data(bad_sample=13))
    assert not list(tmp_path.iterdir())


def test_overflow_of_a_small_dtype(tmp_path: Path) -> None:
    studied = TinyStudied()
    with torch.no_grad():
        studied.model.norm.bias.fill_(1e5)
    with pytest.raises(NotFinite, match=r"image-0\.png, as torch\.float16.*bfloat16 or float32"):
        quiet_harvest(tmp_path / "s", studied=studied, dtype="float16")


def test_a_class_without_samples(tmp_path: Path) -> None:
    with pytest.raises(EmptyClass, match="'bee' has no samples in split 'train'"):
        quiet_harvest(tmp_path / "s", data=ready_data(labels=[0, 2] * 11 + [0]))
    with pytest.raises(EmptyClass, match="'cat' has no samples in split 'val'"):
        quiet_harvest(tmp_path / "s", data=ready_data(n_val=2))
    assert not list(tmp_path.iterdir())


def test_a_label_outside_of_the_classes(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="Label 7 in split 'train'"):
        quiet_harvest(tmp_path / "s", data=ready_data(labels=[0, 1, 2, 7] + [0] * 19))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    store = quiet_harvest(tmp_path / "s")
    with pytest.raises(OutputExists, match="exists already"):
        quiet_harvest(tmp_path / "s")
    store.verify()


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(NameNotFound, match="Did you mean"):
        quiet_harvest(tmp_path / "s", site="poold")
    with pytest.raises(BadConfig, match="at least 1"):
        quiet_harvest(tmp_path / "s", shard_rows=0)
    if not torch.cuda.is_available():
        with pytest.raises(BadConfig, match=r"0 CUDA devices.*cpu works everywhere"):
            quiet_harvest(tmp_path / "s", device="cuda")


def test_the_key_names_what_differs() -> None:
    studied, data = TinyStudied(), ready_data()
    found = make_key(studied, data, parse_site("pooled", studied), ["train", "val"], "float32")
    again = make_key(
        TinyStudied(), ready_data(), parse_site("head:input", studied), ["train", "val"], "float32"
    )
    assert again == found
    check_fresh("s", found, **found)
    other = make_key(
        TinyStudied(seed=1),
        ready_data(seed=1),
        parse_site("fc", studied),
        ["val", "test"],
        "float16",
    )
    for part, message in {
        "backbone": r"differs in: backbone \(made from weights .{12}, now .{12}\)\. Remove it",
        "site": r"differs in: site \(made at 'fc:input', now 'fc:output'\)\. Remove it",
        "data": r"differs in: data \(other samples.*'val'\); data \(has no split 'test'\)\. Rem",
        "dtype": r"differs in: dtype \(stored as float32, now float16\)\. Remove it",
    }.items():
        with pytest.raises(StaleStore, match=message):
            check_fresh("s", found, **{**found, part: other[part]})  # type: ignore[literal-required,typeddict-item]


def test_one_changed_weight_changes_the_key() -> None:
    studied = TinyStudied()
    site = parse_site("pooled", studied)
    before = make_key(studied, ready_data(), site, ["val"], "float32")
    with torch.no_grad():
        studied.model.norm.running_var[2] *= 1 + 2**-23
    assert make_key(studied, ready_data(), site, ["val"], "float32") != before
