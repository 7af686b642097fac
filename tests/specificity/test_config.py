from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from salve_lm.commands.select_layers import select_layers
from salve_lm.data.text import TextCorpus
from salve_lm.specificity import Attribution, Bootstrap, LatentShift, LayerChoice, MassShare

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "choose-layers.md"


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_function_arguments(select_layers, skip={"trainer", "model"})
    return made


def test_the_guides_yaml_parses_against_the_command() -> None:
    text = GUIDE.read_text().split("```yaml\n")[1].split("```")[0]
    given = yaml.safe_load(text)
    del given["model"]
    given["bootstrap"] = {"confidence": 0.9, "resamples": 400}
    made = parser().instantiate_classes(parser().parse_object(given))
    assert isinstance(made.task, TextCorpus)
    assert [type(s) for s in made.scores] == [MassShare, LatentShift, Attribution]
    assert made.select == LayerChoice("top_n", n=4)
    assert made.bootstrap == Bootstrap(0.9, 400)


def test_every_option_has_help() -> None:
    lines = parser().format_help()
    for option in ("saes", "layers", "scores", "select", "bootstrap", "finetuned", "top_latents"):
        assert f"--{option}" in lines
    helps = {a.dest: a.help for a in parser()._actions if a.dest not in ("help", "print_shtab")}
    assert [name for name, text in helps.items() if not text] == []


def test_specs_are_light_to_import() -> None:
    heavy = "{'scipy', 'sae_lens', 'transformers', 'pandas', 'lightning', 'peft'}"
    code = f"import sys, salve_lm.specificity; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
