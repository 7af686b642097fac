"""Fine-tuning whole and by LoRA, validation, checkpoints, the written folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from salve_lm.activations.hooks import run_to
from salve_lm.activations.sites import parse_site
from salve_lm.errors import BadConfig, MissingFile, NameNotFound, NotFinite, OutputExists
from salve_lm.language import decoder_prefix, load_causal_lm
from salve_lm.modules.language_model import LanguageModel
from salve_lm.modules.learning_rate import learning_rate_factor, total_steps
from salve_lm.modules.lora import LoraOptions
from tests.language.tiny_models import CONFIGS, save_model
from tests.modules.tiny_fits import EPOCHS, Losses, corpus, data, model, trainer

FAMILIES = list(CONFIGS)
WEIGHT = "model.layers.1.mlp.up_proj"


# ------------------------------------------------------------------ training


def test_training_is_adamw_on_the_mean_over_targets(llama: Path, text: str) -> None:
    """Against a loop in plain torch over the same batches."""
    module, given, losses = model(llama, weight_decay=0.1), data(text), Losses()
    fit = trainer(losses)
    fit.fit(module, datamodule=given)

    own = AutoModelForCausalLM.from_pretrained(llama)
    decayed = [p for p in own.parameters() if p.ndim > 1]
    others = [p for p in own.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    tokens = given._tokens()
    sampler = given._sampler(tokens)
    total = EPOCHS * len(sampler)
    assert fit.global_step == total == fit.estimated_stepping_batches
    step = 0
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for rows in sampler:
            batch = tokens.batch(rows)
            logits = own(**batch.model_inputs()).logits
            labels = batch.input_ids.masked_fill(~batch.target, -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            done = (step - 2) / (total - 2)
            share = (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * share
            optimizer.step()
            step += 1
            assert losses.losses[step] == pytest.approx(loss.item(), rel=1e-4)
    for name, p in own.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], p, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LoraOptions(r=2)], ids=["full", "lora"])
def test_every_family_learns_and_is_written(
    family: str, lora: LoraOptions | None, tmp_path: Path, text: str
) -> None:
    before = save_model(tmp_path / "base", family)
    out = tmp_path / "out"
    module = model(tmp_path / "base", lora=lora, out=str(out))
    losses = Losses()
    trainer(losses, max_epochs=4).fit(module, datamodule=data(text))
    steps = list(losses.losses.values())
    assert steps[-1] < steps[0]
    if lora is None:
        after = load_causal_lm(out)
        assert after.dtype == torch.float32
    else:
        after = PeftModel.from_pretrained(load_causal_lm(tmp_path / "base"), out).eval()
        assert {p.name for p in out.iterdir()} >= {"adapter_model.safetensors", "tokenizer.json"}
    ids = torch.arange(20)[None]
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, module(ids))
        assert not torch.allclose(before(input_ids=ids).logits, module(ids), atol=1e-3)
    # as in the source; transformers itself rewrites some fields
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"]


def test_only_text_is_trained_in_a_model_with_images(tmp_path: Path) -> None:
    save_model(tmp_path, "gemma3")
    for lora in (None, LoraOptions(r=2), LoraOptions(r=2, target_modules=("q_proj",))):
        module = model(tmp_path, lora=lora)
        trained = {n for n, p in module.model.named_parameters() if p.requires_grad}
        assert trained
        assert not any("vision" in n or "multi_modal" in n for n in trained)
        if lora is not None:
            prefix = decoder_prefix(module.model.config)
            assert all(n.startswith(prefix) and "lora_" in n for n in trained)
            leaf = {n.split(".lora_")[0].rpartition(".")[2] for n in trained}
            assert leaf == (set(lora.target_modules or ()) or leaf)
            assert len(leaf) == (7 if lora.target_modules is None else 1)


def test_from_random_weights(llama: Path, text: str) -> None:
    module = LanguageModel(
        config=CONFIGS["gemma3_text"], tokenizer=str(llama), learning_rate=1e-2, seed=3
    )
    losses = Losses()
    trainer(losses).fit(module, datamodule=data(text))
    assert losses.losses[len(losses.losses)] < losses.losses[1]
    assert LanguageModel(config=CONFIGS["llama"], dtype="bfloat16").model.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing_but_memory(llama: Path, text: str) -> None:
    runs = []
    for again in (False, True):
        losses = Losses()
        fit = trainer(losses, max_steps=3)
        fit.fit(model(llama, gradient_checkpointing=again), datamodule=data(text))
        runs.append(list(losses.losses.values()))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_learning_rate() -> None:
    rates = [learning_rate_factor(s, 2, 6, "cosine", 0.1) for s in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.1 + 0.45 * (1 + math.sqrt(0.5)),
                                   0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5)), 0.1, 0.1])  # fmt: skip
    assert [learning_rate_factor(s, 0, 4, "linear") for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert learning_rate_factor(10**9, 1, math.inf, "constant") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 4},
        {"max_epochs": 9, "max_steps": 7},
    ],
)
def test_total_steps_are_lightnings(options: dict[str, Any], llama: Path, text: str) -> None:
    fit, given = trainer(**options), data(text)
    given.tasks = []
    fit.fit(model(llama, warmup_steps=0), datamodule=given)
    assert total_steps(fit, given.n_train_batches) == fit.estimated_stepping_batches
    assert fit.global_step == fit.estimated_stepping_batches


# ---------------------------------------------------------------- validation


def test_validation_is_the_loss_of_transformers(llama: Path, text: str) -> None:
    module = model(llama)
    fit = trainer()
    (logged, *_) = fit.validate(module, datamodule=data(text), verbose=False)
    tokenizer, hf = module.tokenizer, load_causal_lm(llama)
    assert tokenizer is not None
    documents = corpus(text, start=7).documents()
    total, n = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    for i, document in enumerate(documents):
        ids = tokenizer(document.prompt + document.text)["input_ids"] + [tokenizer.eos_token_id]
        mine = 0.0
        for first in range(0, len(ids), 23):  # a BOS and 23 more fill the context
            window = torch.tensor([[tokenizer.bos_token_id, *ids[first : first + 23]]])
            with torch.no_grad():
                loss = hf(input_ids=window, labels=window).loss
            mine += float(loss) * (window.shape[1] - 1)
        row = module.results["all"][i]
        assert (row["sample"], row["subject"], row["tokens"]) == (i, document.group, len(ids))
        assert row["nll"] == pytest.approx(mine, rel=1e-5)
        total[str(document.group)] += mine
        n[str(document.group)] += len(ids)
    assert logged["all/loss"] == pytest.approx(sum(total.values()) / sum(n.values()), rel=1e-5)
    assert logged["all/loss/b"] == pytest.approx(total["b"] / n["b"], rel=1e-5)
    told = module.results["told"]
    tell = [len(tokenizer(d.text)["input_ids"]) + 1 for d in corpus(text, limit=7).documents()]
    assert [row["tokens"] for row in told] == tell
    fit.test(module, datamodule=data(text), verbose=False)
    assert [r["sample"] for r in module.results["told"]] == list(range(7))


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_the_hidden_states_of_transformers(family: str, tmp_path: Path) -> None:
    save_model(tmp_path, family)
    module = model(tmp_path)
    site = parse_site("resid_post.1", module)
    late = module.model.get_submodule(f"{decoder_prefix(module.model.config)}.2")
    late.register_forward_pre_hook(lambda *_: pytest.fail("ran beyond the deepest site"))
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids, "use_cache": False}
    read = run_to(module.model, {"x": site}, inputs)["x"]
    hidden = load_causal_lm(tmp_path)(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(read, hidden.flatten(0, 1))


# --------------------------------------------------------------- checkpoints


def checkpoint_of(folder: Path, module: LanguageModel, text: str) -> dict[str, Any]:
    fit = trainer(ModelCheckpoint(folder / "checkpoints", save_last=True), max_steps=2)
    fit.fit(module, datamodule=data(text))
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[no-any-return]


def test_a_lora_checkpoint_holds_the_adapter_alone(llama: Path, text: str, tmp_path: Path) -> None:
    module = model(llama, lora=LoraOptions(r=2, rslora=True))
    checkpoint = checkpoint_of(tmp_path, module, text)
    assert {k.split(".lora_")[1] for k in checkpoint["state_dict"]} == {
        "A.default.weight", "B.default.weight"
    }  # fmt: skip
    assert "hyper_parameters" not in checkpoint
    fresh = model(llama, lora=LoraOptions(r=2, rslora=True))
    path = tmp_path / "checkpoints" / "last.ckpt"
    (got, *_) = trainer().validate(fresh, datamodule=data(text), ckpt_path=path, verbose=False)
    (own, *_) = trainer().validate(module, datamodule=data(text), verbose=False)
    assert got == own
    for lora in (None, LoraOptions(r=3, rslora=True)):
        with pytest.raises(BadConfig, match=r"holds another model: lora .* it was trained with"):
            trainer().validate(model(llama, lora=lora), datamodule=data(text), ckpt_path=path)


def test_frozen_parts_stay_out_of_checkpoints(tmp_path: Path, text: str) -> None:
    save_model(tmp_path, "gemma3")
    checkpoint = checkpoint_of(tmp_path, model(tmp_path), text)
    assert checkpoint["state_dict"]
    assert not any("vision" in k for k in checkpoint["state_dict"])


def test_a_checkpoint_of_another_model(llama: Path, text: str, tmp_path: Path) -> None:
    checkpoint_of(tmp_path, model(llama), text)
    save_model(tmp_path / "other", "gemma3_text")
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(BadConfig, match=r"another model: model_type 'llama', here 'gemma3_text'"):
        trainer().validate(model(tmp_path / "other"), datamodule=data(text), ckpt_path=path)


# ---------------------------------------------------------------- bad input


def test_an_existing_out_is_refused_before_training(llama: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    losses = Losses()
    with pytest.raises(OutputExists):
        trainer(losses).fit(model(llama, out=str(tmp_path / "out")), datamodule=data(text))
    assert not losses.losses


def test_a_diverged_run_stops_and_writes_nothing(llama: Path, text: str, tmp_path: Path) -> None:
    module = model(llama, learning_rate=1e30, warmup_steps=0, out=str(tmp_path / "out"))
    keep = ModelCheckpoint(tmp_path / "c", save_last=True, every_n_train_steps=1)
    with pytest.raises(NotFinite, match=r"NaN or infinity.*Lower learning_rate"):
        trainer(keep, max_steps=5).fit(module, datamodule=data(text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": None}, "either a `source` or a `config`"),
        ({"config": {"model_type": "llama"}}, "either a `source` or a `config`"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"final_learning_rate": 2.0}, "a share from 0 to 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(BadConfig, match=message):
        LanguageModel(**{"source": str(llama), **options})


def test_bad_lora(llama: Path) -> None:
    with pytest.raises(NameNotFound, match=r"'q_porj'.*'q_proj'"):
        model(llama, lora=LoraOptions(target_modules=("q_porj",)))
    with pytest.raises(BadConfig, match="r of at least 1"):
        LoraOptions(r=0)


def test_what_does_not_fit_together(llama: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"warmup_steps=99 does not fit into \d+ training steps"):
        trainer().fit(model(llama, warmup_steps=99), datamodule=data(text))
    with pytest.raises(BadConfig, match="A schedule needs an end"):
        trainer(max_epochs=-1).fit(model(llama), datamodule=data(text))
    with pytest.raises(BadConfig, match="context=65, but the model reads at most 64"):
        trainer().fit(model(llama), datamodule=data(text, context=65))
    with pytest.raises(MissingFile, match="No tokenizer in"):
        LanguageModel(str(llama), tokenizer=str(tmp_path / "nothing"))
    bare = LanguageModel(config=CONFIGS["llama"])
    with pytest.raises(BadConfig, match="takes the tokenizer of the model"):
        trainer().fit(bare, datamodule=data(text))
    empty = data(text)
    empty.train = None
    with pytest.raises(BadConfig, match="Nothing to train on"):
        trainer().fit(model(llama), datamodule=empty)
    empty.tasks = []
    with pytest.raises(BadConfig, match="Nothing to evaluate"):
        trainer().validate(model(llama), datamodule=empty)
    with pytest.raises(BadConfig, match="Two tasks are called 'told'"):
        type(empty)(tasks=[data(text).tasks[0]] * 2)


def test_a_model_spread_over_devices_is_not_moved_or_trained(llama: Path, text: str) -> None:
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places: dict[str, Any] = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    module = model(llama, device_map={**places, "model.layers.2": "disk"})
    (spread, *_) = trainer().validate(module, datamodule=data(text), verbose=False)
    (whole, *_) = trainer().validate(model(llama), datamodule=data(text), verbose=False)
    assert spread == pytest.approx(whole, rel=1e-5)
    with pytest.raises(BadConfig, match="several devices cannot be trained"):
        trainer().fit(module, datamodule=data(text))


def test_adapters_name_their_targets_simply_where_they_can(tmp_path: Path) -> None:
    for family, simple in (("llama", True), ("gpt2", True), ("gemma3", False)):
        save_model(tmp_path / family, family)
        module = model(tmp_path / family, lora=LoraOptions(r=2))
        targets = module._adapter[0].peft_config["default"].target_modules
        assert isinstance(targets, str) != simple


def test_frozen_parameters(llama: Path, text: str) -> None:
    module = model(llama, frozen=["model.embed_tokens.*"], warmup_steps=0)
    before = {n: p.clone() for n, p in module.model.named_parameters()}
    trainer(max_steps=1).fit(module, datamodule=data(text))
    changed = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == before.keys() - {"model.embed_tokens.weight"}
    with pytest.raises(NameNotFound, match=r"No parameter named 'model.embed'"):
        model(llama, frozen=["model.embed"])
    with pytest.raises(BadConfig, match="leaves no parameter to train"):
        model(llama, frozen=["*"])
