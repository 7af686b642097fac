"""The command line: help, named configs, errors without tracebacks, completion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from salve_lm.cli import main
from salve_lm.configs import ROOT, find_config, list_configs, named_configs
from salve_lm.errors import NameNotFound

pytestmark = pytest.mark.usefixtures("empty_folder")
COMMANDS = (
    "fit", "validate", "test", "predict", "discover", "sweep", "robustness", "select_layers",
    "inject", "measure", "edit", "compare", "report",
)  # fmt: skip
# config -> subcommand it is for; the others are groups that these include
RUNS = {
    "demo/1_backbone": "fit",
    "demo/2_autoencoder": "fit",
    "demo/3_discover": "discover",
    "demo/4_sweep": "sweep",
    "demo/5_verify": "validate",
    "demo/6_validate": "validate",
    "demo/7_export": "edit",
    "demo/8_exported": "validate",
    "experiment/imagenette_squeezenet/1_backbone": "fit",
    "experiment/imagenette_squeezenet/2_autoencoder": "fit",
    "experiment/imagenette_squeezenet/3_discover": "discover",
    "experiment/imagenette_squeezenet/4_sweep": "sweep",
    "experiment/imagenette_squeezenet/5_thresholds": "validate",
    "experiment/imagenette_squeezenet/6_export": "edit",
    "experiment/gemma3_4b_math/1_finetune": "fit",
    "experiment/gemma3_4b_math/2_base": "validate",
    "experiment/gemma3_4b_math/3_finetuned": "validate",
    "experiment/gemma3_4b_math/4_layers": "select_layers",
    "experiment/gemma3_4b_math/5_injected": "validate",
    "experiment/gemma3_4b_math/6_inject": "inject",
    "experiment/gemma3_4b_math/7_export": "edit",
    "experiment/stories260k_math/1_finetune": "fit",
    "experiment/stories260k_math/2_strengths": "inject",
    "experiment/stories260k_math/3_autoencoders": "fit",
    "experiment/stories260k_math/4_layers": "select_layers",
    "experiment/stories260k_math/5_inject": "inject",
    "experiment/stories260k_math/6_export": "edit",
    "tiny_gemma3/1_base": "fit",
    "tiny_gemma3/2_finetuned": "fit",
    "tiny_gemma3/3_evaluate": "validate",
    "demo_lm/2_autoencoders": "fit",
    "demo_lm/3_layers": "select_layers",
    "demo_lm/4_inject": "inject",
    "demo_lm/5_export": "edit",
    "demo_lm/6_edits": "measure",
    "experiment/imagenette_frozen/1_backbone": "fit",
    "experiment/imagenette_frozen/2_autoencoder": "fit",
    "experiment/imagenette_frozen/3_discover": "discover",
    "experiment/imagenette_frozen/4_sweep": "sweep",
    "experiment/imagenette_frozen/5_thresholds": "validate",
    "experiment/robustness/digits_seeds": "robustness",
    "experiment/robustness/digits_settings": "robustness",
    "experiment/shortcut_blind/1_backbone": "fit",
    "experiment/shortcut_blind/2_autoencoder": "fit",
    "experiment/shortcut_blind/3_discover": "discover",
    "experiment/shortcut_blind/4_check": "validate",
    "experiment/shortcut/1_backbone": "fit",
    "experiment/shortcut/2_autoencoder": "fit",
    "experiment/shortcut/3_discover": "discover",
    "experiment/shortcut/4_check": "validate",
    "experiment/vit_digits/1_backbone": "fit",
    "experiment/vit_digits/2_autoencoder": "fit",
    "experiment/vit_digits/3_discover": "discover",
    "experiment/vit_digits/4_sweep": "sweep",
    "experiment/vit_digits/5_verify": "validate",
}
GROUPS = ("data/", "model/", "trainer/", "edit/")
PARTS = ("/model", "/data", "/pooled")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs by mistake writes nothing into the checkout."""
    monkeypatch.chdir(tmp_path)


def exit_message(args: list[str]) -> str:
    with pytest.raises(SystemExit) as e:
        main(args)
    return str(e.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_message([command, "--help"]) == "0"
    shown = capsys.readouterr().out
    assert "usage: salve-lm" in shown
    undocumented = [a for a in _options_without_help(command)]
    assert not undocumented


def _options_without_help(command: str) -> list[str]:
    from salve_lm.completion import subcommand_parsers

    parser = subcommand_parsers()[command]
    return [a.dest for a in parser._actions if not a.help and a.option_strings]


def test_every_shipped_config_is_known_here() -> None:
    runs = [c for c in list_configs() if not c.startswith(GROUPS) and not c.endswith(PARTS)]
    assert sorted(runs) == sorted(RUNS)


@pytest.mark.parametrize(("config", "command"), RUNS.items())
def test_every_shipped_config_parses(
    config: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = yaml.safe_load((ROOT / f"{config}.yaml").read_text())
    extra = ["--config", "edit/comparison"] if command == "sweep" else []
    if command == "edit" and "edits" not in given:
        edits = [{"class_path": "salve_lm.edits.LowerClassBias", "init_args": {"target_class": 0}}]
        extra = [f"--edits={yaml.safe_dump(edits, default_flow_style=True)}"]
    assert exit_message([command, "--config", config, *extra, "--print_config"]) == "0"
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert set(given) <= set(parsed)


def test_a_config_name_is_suggested() -> None:
    with pytest.raises(NameNotFound, match="demo/1_backbone"):
        find_config("demo/1_backbon")
    assert "Did you mean 'demo/1_backbone'" in exit_message(["fit", "--config", "demo/backbone"])


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "1_backbone").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_config("demo/1_backbone") == "demo/1_backbone"
    assert named_configs(["fit", "-c", "demo/1_backbone"]) == ["fit", "-c", "demo/1_backbone"]
    assert named_configs(["--config=demo/2_autoencoder"]) == [
        f"--config={ROOT / 'demo/2_autoencoder.yaml'}"
    ]


def test_cuda_without_cuda_is_one_line() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    message = exit_message(["fit", "--config", "demo/1_backbone", "--trainer.accelerator=cuda"])
    assert message.startswith("error: ")
    assert "--trainer.accelerator" in message


def test_the_debug_switch_shows_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALVE_LM_DEBUG", "1")
    with pytest.raises(NameNotFound):
        main(["fit", "--config", "nothing"])


def test_an_unknown_option_exits_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_message(["fit", "--config", "demo/1_backbone", "--trainer.max_epoks=1"]) == "2"
    said = capsys.readouterr().err
    assert "max_epoks" in said
    assert len(said.splitlines()) <= 3


def test_environment_variables_set_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SALVE_LM_FIT__TRAINER__MAX_EPOCHS", "77")
    assert exit_message(["fit", "--model=vision.Classifier", "--print_config"]) == "0"
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 77


def test_completion_is_small_and_valid_bash(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert len(script) < 200_000
    probe = (
        'COMP_WORDS=(salve-lm fit --trainer.max_ep); COMP_CWORD=2; _salve_lm; echo "$COMPREPLY"; '
        'COMP_WORDS=(salve-lm swe); COMP_CWORD=1; _salve_lm; echo "$COMPREPLY"; '
        'COMP_WORDS=(salve-lm fit --config demo/1); COMP_CWORD=3; _salve_lm; echo "$COMPREPLY"'
    )
    done = subprocess.run(
        ["bash", "-c", script + probe], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:3] == ["--trainer.max_epochs", "sweep", "demo/1_backbone"]
    assert done.stderr == ""


def test_completion_for_another_shell_names_those_there_are() -> None:
    assert "bash" in exit_message(["completion", "bsh"])


def test_starting_is_light() -> None:
    code = (
        "import sys; import salve_lm.cli; "
        "heavy = {'sae_lens', 'torchvision', 'timm', 'transformers', 'pandas', 'sklearn'}; "
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lightning = subprocess.run(
        [sys.executable, "-c", code.replace("salve_lm.cli", "lightning")],
        capture_output=True,
        text=True,
    )
    # nothing heavy beyond what Lightning itself brings
    assert set(done.stderr.split()) <= set(lightning.stderr.split())
