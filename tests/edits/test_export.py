from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from salve_lm.edits import (
    DecoderGuided,
    EditContext,
    EditSpec,
    LatentContrastErasure,
    LowerClassBias,
    PlainModel,
    Steering,
    apply_named,
    plan_edits,
)
from salve_lm.edits.export import Exported, export, rebuild
from salve_lm.errors import (
    BadConfig,
    CorruptFile,
    MissingFile,
    NameNotFound,
    OutputExists,
    OutputUnwritable,
    StaleStore,
    UnsupportedEdit,
)
from salve_lm.hashing import hash_file, hash_tensors
from tests.edits.tiny import D_IN, NAMES, Fixture, Net, state


def specs(tiny: Fixture) -> list[EditSpec]:
    return [
        DecoderGuided(feature="dominant:tower", alpha=3.0, **tiny.paths),
        LatentContrastErasure(target_class="church", top_k=3, **tiny.paths),
        Steering(feature=4, alpha=0.3, **tiny.paths),
        LowerClassBias(target_class="pump", alpha=1.0),
    ]


def run(tiny: Fixture, out: Path, **options: Any) -> Exported:
    options = {"edits": specs(tiny), "class_names": NAMES, **options}
    return export(tiny.studied, out=out, **options)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "edit.json").read_text())


def test_opens_in_plain_torch_and_equals_the_live_edit(tiny: Fixture, tmp_path: Path) -> None:
    before = state(tiny.studied.model)
    done = run(tiny, tmp_path / "out", info={"library": "torchvision", "name": "resnet18"})
    assert all(torch.equal(t, before[n]) for n, t in tiny.studied.model.state_dict().items())

    plain, live = Net().eval(), Net().eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    plans = plan_edits(specs(tiny), tiny.studied, EditContext(), NAMES)
    live.load_state_dict(before | apply_named(before, [p.named for p in plans]).tensors)
    images = torch.randn(20, 5)
    with torch.no_grad():
        assert torch.equal(plain(images), live(images))
    assert done.sha256 == hash_file(tmp_path / "out" / "model.safetensors")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "edit.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_record(tiny: Fixture, tmp_path: Path) -> None:
    from salve_lm.sae import hash_sae

    run(tiny, tmp_path / "out", info={"library": "torchvision", "name": "resnet18"})
    data = record(tmp_path / "out")
    before = state(tiny.studied.model)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert (data["format"], data["version"]) == ("salve_lm.edit", 1)
    assert data["model"] == {"library": "torchvision", "name": "resnet18"}
    assert data["base"] == {"sha256": hash_tensors(before), "tensors": len(before)}
    assert data["result"]["sha256"] == hash_tensors(after)
    assert data["sha256"]["model.safetensors"] == hash_file(tmp_path / "out" / "model.safetensors")
    assert set(data["versions"]) == {"salve_lm", "torch", "safetensors"}
    first, *_, last = data["edits"]
    assert first["spec"]["class_path"] == "salve_lm.edits.decoder_guided.DecoderGuided"
    assert first["spec"]["init_args"]["feature"] == "dominant:tower"
    assert first["features"] == [tiny.table.dominant("tower")]
    assert first["target"] == NAMES.index("tower")
    assert first["sources"]["sae"] == {"path": tiny.sae, "sha256": hash_sae(tiny.sae)}
    weights = Path(tiny.features) / "features.safetensors"
    assert first["sources"]["features"] == {"path": tiny.features, "sha256": hash_file(weights)}
    assert last["sources"] == {}
    changed = {c["name"]: c for c in data["changed"]}
    assert set(changed) == {"fc.weight", "fc.bias"}
    for name, entry in changed.items():
        old, new = before[name].double(), after[name].double()
        assert entry["norm_before"] == pytest.approx(float(old.norm()))
        assert entry["norm_after"] == pytest.approx(float(new.norm()))
        assert entry["relative_change"] == pytest.approx(float((new - old).norm() / old.norm()))
        assert entry["applied_energy"] == pytest.approx(1)
        assert entry["shape"] == list(old.shape)
        assert entry["dtype"] == "float32"
    untouched = set(before) - set(changed)
    assert all(torch.equal(before[n], after[n]) for n in untouched)


def test_the_spec_in_the_record_can_be_used_again(tiny: Fixture, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    arguments = record(tmp_path / "out")["edits"][0]["spec"]["init_args"]
    assert DecoderGuided(**arguments) == specs(tiny)[0]


@pytest.mark.parametrize("form", ["state", "file", "folder"])
def test_rebuilds_the_same_bytes_without_sae_or_table(
    tiny: Fixture, tmp_path: Path, form: str
) -> None:
    from safetensors.torch import save_file

    done = run(tiny, tmp_path / "out")
    base: Any = state(tiny.studied.model)
    if form != "state":
        (tmp_path / "base").mkdir()
        save_file(base, tmp_path / "base" / "model.safetensors")
        base = tmp_path / "base" / ("model.safetensors" if form == "file" else "")
    assert rebuild(tmp_path / "out" / "edit.json", base, tmp_path / "again") == done.sha256
    for name in ("model.safetensors", "edit.json"):
        first, second = (tmp_path / f / name for f in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_low_precision_reports_what_storage_kept(tiny: Fixture, tmp_path: Path) -> None:
    net = Net()
    net.load_state_dict(tiny.studied.model.state_dict())
    model = PlainModel(net.bfloat16(), "fc")
    edits = [DecoderGuided(feature=1, alpha=0.004, rows="all", sae=tiny.sae)]
    export(model, edits, tmp_path / "out", context=tiny.context)
    (entry,) = record(tmp_path / "out")["changed"]
    assert entry["dtype"] == "bfloat16"
    assert 0 < entry["cosine"] < 0.9
    assert entry["applied_energy"] != pytest.approx(1, abs=1e-3)


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, D_IN)
        self.fc = nn.Linear(D_IN, 4)
        self.fc.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(x))


def test_allowed_ties_change_under_every_name(tiny: Fixture, tmp_path: Path) -> None:
    net = TiedNet()
    edits = [DecoderGuided(feature=1, alpha=2.0, sae=tiny.sae, allow_tied=True)]
    done = export(PlainModel(net, "fc"), edits, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["embed.weight"], after["fc.weight"])
    assert not torch.equal(after["fc.weight"], net.fc.weight)
    assert record(tmp_path / "out")["tied"] == {"embed.weight": "fc.weight"}
    fresh = TiedNet()
    fresh.load_state_dict(after)
    assert rebuild(tmp_path / "out", net.state_dict(), tmp_path / "again") == done.sha256


def test_ties_that_are_not_edited_are_written_out(tiny: Fixture, tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": TiedNet(), "fc": nn.Linear(D_IN, 2)})
    edits = [DecoderGuided(feature=1, alpha=2.0, sae=tiny.sae)]
    export(PlainModel(net, "fc"), edits, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(net.state_dict())


def test_compiled_models_export_under_plain_names(tiny: Fixture, tmp_path: Path) -> None:
    net = Net()
    net.load_state_dict(tiny.studied.model.state_dict())
    compiled = PlainModel(torch.compile(net, backend="eager"), "fc")
    done = export(compiled, specs(tiny), tmp_path / "out", class_names=NAMES)
    assert done.sha256 == run(tiny, tmp_path / "plain").sha256


def test_refusals(tiny: Fixture, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(OutputExists, match="exists already"):
        run(tiny, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept
    with pytest.raises(BadConfig, match="at least one edit"):
        run(tiny, tmp_path / "none", edits=[])
    with pytest.raises(NameNotFound):
        run(tiny, tmp_path / "typo", edits=[LowerClassBias(target_class="twer")])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable):
        run(tiny, tmp_path / "file" / "out")

    class Odd(Net):
        def get_extra_state(self) -> object:
            return "text"

    with pytest.raises(UnsupportedEdit, match="extra state"):
        edits = [LowerClassBias(target_class=0)]
        export(PlainModel(Odd(), "fc"), edits, tmp_path / "odd")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_a_full_disk_leaves_nothing(
    tiny: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputUnwritable, match="disk is full"):
        run(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_rebuilds(tiny: Fixture, tmp_path: Path) -> None:
    folder = run(tiny, tmp_path / "out").path
    base = state(tiny.studied.model)
    with pytest.raises(MissingFile):
        rebuild(tmp_path / "nowhere", base, tmp_path / "again")
    with pytest.raises(MissingFile):
        rebuild(folder, tmp_path / "nowhere", tmp_path / "again")
    with pytest.raises(OutputExists):
        rebuild(folder, base, folder)
    with pytest.raises(StaleStore, match="not those that"):
        rebuild(folder, load_file(folder / "model.safetensors"), tmp_path / "again")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile):
        rebuild(folder, tmp_path / "bad.safetensors", tmp_path / "again")
    good = record(folder)
    path = tmp_path / "edit.json"
    for change, message in [
        ({"format": "x"}, "not a salve_lm.edit record"),
        ({"version": 2}, "format version 2"),
        ({"edits": [{"title": "t"}]}, "damaged edits"),
        ({"result": {"sha256": "0"}}, "differ from the recorded ones"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CorruptFile, match=message):
            rebuild(path, base, tmp_path / "again")
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "base"}))
    with pytest.raises(CorruptFile, match="'base'"):
        rebuild(path, base, tmp_path / "again")
    path.write_text("{")
    with pytest.raises(CorruptFile, match="JSON"):
        rebuild(path, base, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_check_sees_the_file_before_it_is_final(tiny: Fixture, tmp_path: Path) -> None:
    def check(weights: Path, live: Any) -> dict[str, Any]:
        assert not (tmp_path / "out").exists()
        written = load_file(weights)
        return {"same": all(torch.equal(written[n], t) for n, t in live.items())}

    def refuse(weights: Path, live: Any) -> dict[str, Any]:
        raise StaleStore("they differ")

    done = run(tiny, tmp_path / "out", check=check)
    assert record(done.path)["check"] == {"same": True}
    with pytest.raises(StaleStore, match="they differ"):
        run(tiny, tmp_path / "refused", check=refuse)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    again = rebuild(done.path, state(tiny.studied.model), tmp_path / "again")
    assert again == done.sha256
    assert record(tmp_path / "again") == record(done.path)


KILLED = """
import sys, time, torch
from pathlib import Path
import safetensors.torch
from torch import nn
from salve_lm.edits import LowerClassBias, PlainModel
from salve_lm.edits.export import export
write = safetensors.torch.save_file
def slowly(tensors, path, metadata):
    write(tensors, path, metadata)
    print("written", flush=True)
    time.sleep(60)
if sys.argv[2] == "slow":
    safetensors.torch.save_file = slowly
torch.manual_seed(0)
model = PlainModel(nn.Sequential(nn.Linear(3, 2)), "0")
export(model, [LowerClassBias(target_class=0)], sys.argv[1])
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "written"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.partial-") for p in tmp_path.iterdir())
    subprocess.run([*command, "fast"], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
