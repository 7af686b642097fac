"""Activations of tokens, against a forward pass with a hook of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salve_lm.activations.store import ActivationStore
from salve_lm.activations.tokens_data import TokenActivationData
from salve_lm.errors import BadConfig, CorruptFile, NameNotFound, NotFinite, StaleStore
from tests.activations.tiny_language import LAYERS, WIDTH, TinyCorpus, TinyLanguage

SITES = [f"resid_post.{n}" for n in range(LAYERS)]


def data(**options: Any) -> TokenActivationData:
    settings: dict[str, Any] = {
        "model": TinyLanguage(), "train": TinyCorpus(), "val": TinyCorpus(9, seed=1), "context": 12,
        "batch_size": 32, "buffer_rows": 128, "sequences": 5,
    }  # fmt: skip
    made = TokenActivationData(**{**settings, **options})
    made.prepare_data()
    made.setup("fit")
    return made


def rows_of(loader: Any) -> dict[int, dict[str, Tensor]]:
    """position -> its activations."""
    found: dict[int, dict[str, Tensor]] = {}
    for batch in loader:
        assert batch.n_global == len(batch.sample)
        for i, position in enumerate(batch.position.tolist()):
            assert position not in found
            found[position] = {site: x[i] for site, x in batch.x.items()}
    return found


@torch.no_grad()
def by_hand(made: TokenActivationData, split: str) -> dict[int, dict[str, Tensor]]:
    """Every token that is neither BOS, first of its document, nor padding; one window at a time."""
    assert made.model is not None
    model, windows, found = made.model.model, made.windows(split), {}
    for w in range(len(windows)):
        window = windows.batch(torch.tensor([w]))
        states = model(**window.model_inputs(), output_hidden_states=True).hidden_states
        read: list[Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(lambda *a, r=read: r.append(a[2]))
        model(**window.model_inputs())
        handle.remove()  # the last of transformers' own states is behind the final norm
        for column in range(windows.context):
            token, place = window.input_ids[0, column], window.position_ids[0, column]
            if token in (0, 1) or place == 0:
                continue
            layers = [*(s[0, column] for s in states[1:-1]), read[0][0, column]]
            found[w * windows.context + column] = dict(zip(SITES, layers, strict=True))
    return found


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_those_of_the_model_written_out(stored: bool, split: str, tmp_path: Path) -> None:
    made = data(store=str(tmp_path / "store") if stored else None)
    loader = made.train_dataloader() if split == "train" else made.val_dataloader()
    found, expected = rows_of(loader), by_hand(made, split)
    assert found.keys() == expected.keys()
    for position, sites in expected.items():
        assert found[position].keys() == sites.keys()
        for site, x in sites.items():
            torch.testing.assert_close(found[position][site], x, rtol=1e-4, atol=1e-5)


def test_store_and_streaming_draw_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    a = list(data(seed=3).train_dataloader())
    b = list(data(seed=3, store=str(tmp_path / "store")).train_dataloader())
    assert len(a) == len(b) > 3
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.position, y.position)
        assert torch.equal(x.sample, y.sample)
        torch.testing.assert_close(x.x, y.x, rtol=1e-5, atol=1e-6)


def test_the_model_runs_once_over_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made = data(buffer_rows=10_000)
    assert made.model is not None
    seen: list[int] = []
    inner = made.model.model.model
    ran = [0] * LAYERS
    for n, layer in enumerate(inner.layers):
        layer.register_forward_hook(lambda *_, n=n: ran.__setitem__(n, ran[n] + 1))
    inner.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    head = []
    made.model.model.lm_head.register_forward_hook(lambda *_: head.append(1))
    list(made.train_dataloader())
    assert sum(seen) == len(made.windows("train"))
    assert ran == [len(seen)] * LAYERS
    assert not head


def test_only_as_deep_as_the_deepest_site() -> None:
    made = data(sites=["resid_post.0"])
    assert made.model is not None
    ran = []
    made.model.model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    batch = next(iter(made.train_dataloader()))
    assert list(batch.x) == ["resid_post.0"]
    assert not ran


def test_all_sites_and_their_widths() -> None:
    made = data()
    assert made.sites == SITES
    assert {made.d_in_of(site) for site in SITES} == {WIDTH}
    told = made.metadata_of("resid_post.2")
    assert told["hook_name"] == "blocks.2.hook_resid_post"
    assert told["layer"] == 2
    assert told["context_size"] == 12
    origin = made.provenance_of("resid_post.2", "train")
    assert origin["site"] == "model.layers.2:output:positions"


def test_a_half_precision_buffer() -> None:
    loader = data(buffer_dtype="bfloat16").train_dataloader()
    whole = {int(p): x for b in data().train_dataloader() for p, x in
             zip(b.position, b.x["resid_post.1"], strict=True)}  # fmt: skip
    batch = next(iter(loader))
    assert batch.x["resid_post.1"].dtype == torch.float32
    expected = torch.stack([whole[p] for p in batch.position.tolist()]).bfloat16().float()
    assert torch.equal(batch.x["resid_post.1"], expected)
    assert loader.buffer_bytes == 2 * 128 * (LAYERS * WIDTH * 2 + 16)
    alone = data(buffer_dtype="bfloat16", prefetch=False).train_dataloader()
    assert alone.buffer_bytes == 128 * (LAYERS * WIDTH * 2 + 16)


def test_a_store_holds_an_ordinary_store_for_each_site(tmp_path: Path) -> None:
    made = data(store=str(tmp_path / "store"), shard_rows=50)
    one = ActivationStore(tmp_path / "store" / "resid_post.1")
    one.verify()
    n = one.rows("train")
    rows = one.gather("train", torch.arange(n))
    assert set(rows.label.tolist()) == {-1}
    assert int(rows.sample.max()) == 59
    x = one.column("train", "x")
    assert torch.equal(torch.cat([x.read(0, 77), x.read(77, n)]), rows.x)
    assert len(x.read(20, 20)) == 0
    with pytest.raises(IndexError):
        x.read(0, n + 1)
    # opened without a model
    again = TokenActivationData(store=str(tmp_path / "store"), batch_size=32, buffer_rows=128)
    again.setup("fit")
    assert again.sites == SITES
    same = zip(again.train_dataloader(), made.train_dataloader(), strict=True)
    assert all(torch.equal(a.x["resid_post.0"], b.x["resid_post.0"]) for a, b in same)


def test_a_stale_store(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    data(store=store)
    with pytest.raises(StaleStore, match="backbone"):
        data(store=store, model=TinyLanguage(seed=1))
    with pytest.raises(StaleStore, match="data"):
        data(store=store, train=TinyCorpus(61))
    with pytest.raises(StaleStore, match="data"):
        data(store=store, context=13)


def test_a_damaged_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    data(store=str(store))
    (store / "train.safetensors").write_bytes(b"x")
    made = data(store=str(store))
    with pytest.raises(CorruptFile, match="damaged"):
        made.train_dataloader()
    (store / "tokens.json").write_text("{")
    with pytest.raises(CorruptFile, match="damaged"):
        data(store=str(store))
    (store / "tokens.json").unlink()
    with pytest.raises(CorruptFile, match="not a store of token activations"):
        data(store=str(store))


def test_a_site_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NameNotFound, match=r"resid_post\.2"):
        data(sites=["resid_post.3"])
    data(store=str(tmp_path / "store"), sites=["resid_post.0"])
    with pytest.raises(NameNotFound, match="harvest again"):
        data(store=str(tmp_path / "store"), sites=["resid_post.1"])


def test_a_site_that_is_no_row_a_token() -> None:
    with pytest.raises(BadConfig, match="':positions'"):
        data(sites=["model.layers.0:output:mean"])


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(BadConfig, match="needs a `store`, or a `model` and a `train`"):
        TokenActivationData(model=TinyLanguage())
    with pytest.raises(BadConfig, match="different sites"):
        data(sites=["resid_post.0", "resid_post.0"])
    with pytest.raises(BadConfig, match="cannot hold a batch"):
        data(buffer_rows=8).train_dataloader()
    with pytest.raises(BadConfig, match="No text of split 'test'"):
        data().test_dataloader()
    with pytest.raises(BadConfig, match="sequences"):
        data(sequences=0)


def test_a_model_with_nan_is_named() -> None:
    model = TinyLanguage()
    with torch.no_grad():
        model.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"layers\.1.*window"):
        data(model=model)


def test_half_precision_that_overflows_is_refused(tmp_path: Path) -> None:
    model = TinyLanguage()
    with torch.no_grad():
        model.model.model.layers[0].mlp.down_proj.weight *= 1e7
    with pytest.raises(NotFinite, match="bfloat16 or float32"):
        data(model=model, store=str(tmp_path / "store"), dtype="float16")
    assert not (tmp_path / "store").exists()
