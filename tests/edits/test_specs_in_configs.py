"""Every spec as a command line or a YAML file names it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse import _common as jsonargparse_settings

import salve_lm.edits as edits
from salve_lm.edits.spec import EditSpec, spec_to_dict

KINDS = [
    getattr(edits, n)
    for n in edits.__all__
    if isinstance(getattr(edits, n), type)
    and issubclass(getattr(edits, n), EditSpec)
    and getattr(edits, n) is not EditSpec
    # of language models, without a class: see test_task_vector.py and below
    and getattr(edits, n)
    not in (edits.TaskVectorInjection, edits.ResidualScaling, edits.ResidualAblation)
]


@pytest.fixture()
def parser() -> Iterator[ArgumentParser]:
    before = dict(jsonargparse_settings.parsing_settings)
    set_parsing_settings(subclasses_enabled=[EditSpec])
    parser = ArgumentParser()
    parser.add_argument("--edits", type=list[EditSpec])
    yield parser
    jsonargparse_settings.parsing_settings.update(before)


def test_there_are_all_of_them() -> None:
    assert len(KINDS) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_default_strengths_are_an_increasing_grid(kind: type[EditSpec]) -> None:
    grid = kind.default_alphas
    assert list(grid) == sorted(set(grid))
    assert all(dataclasses.replace(kind(), alpha=a).alpha == a for a in grid)
    assert kind.grid_kind in {"alpha", "fraction", "logit", "norm"}


@pytest.mark.parametrize("kind", KINDS)
def test_by_class_path(parser: ArgumentParser, kind: type[EditSpec]) -> None:
    spec = kind(target_class="church", alpha=2.5, name="mine")
    text = yaml.safe_dump([spec_to_dict(spec)])
    parsed = parser.parse_args([f"--edits={text}"])
    assert parser.instantiate_classes(parsed).edits == [spec]
    dumped = parser.dump(parsed)
    again = parser.parse_string(dumped)
    assert parser.instantiate_classes(again).edits == [spec]


@pytest.mark.parametrize("kind", [edits.ResidualScaling, edits.ResidualAblation])
@pytest.mark.parametrize("latents", [[3, 1], {2: [3, 1]}, "layers.json", None])
def test_edits_of_language_models(
    parser: ArgumentParser, kind: type[EditSpec], latents: object
) -> None:
    spec = kind(layers=[2], latents=latents, sae="sae_{layer}", alpha=2.5, top=4)
    parsed = parser.parse_args([f"--edits={yaml.safe_dump([spec_to_dict(spec)])}"])
    assert parser.instantiate_classes(parsed).edits == [spec]
    again = parser.parse_string(parser.dump(parsed))
    assert parser.instantiate_classes(again).edits == [spec]
    assert list(kind.default_alphas) == sorted(set(kind.default_alphas))


def test_short_names_lists_and_indices(parser: ArgumentParser) -> None:
    text = """
    - class_path: salve_lm.edits.DecoderGuided
      init_args: {feature: [17, "dominant:church"], rows: [church, 3], alpha: 8}
    - class_path: salve_lm.edits.DecoderGuided
      init_args: {feature: 17, rows: class, target_class: 3}
    - class_path: LowerClassBias
      init_args: {target_class: golf ball}
    """
    parsed = parser.instantiate_classes(parser.parse_args([f"--edits={text}"]))
    assert isinstance(parsed, Namespace)
    assert parsed.edits == [
        edits.DecoderGuided(feature=[17, "dominant:church"], rows=["church", 3], alpha=8.0),
        edits.DecoderGuided(feature=17, rows="class", target_class=3),
        edits.LowerClassBias(target_class="golf ball"),
    ]


def test_typos_are_refused(parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[{class_path: salve_lm.edits.DecoderGuided, init_args: {guide: decoder_bas}}]"
    with pytest.raises(SystemExit):
        parser.parse_args([f"--edits={text}"])
    assert "decoder_bas" in capsys.readouterr().err


def test_every_option_is_documented() -> None:
    for kind in KINDS:
        documented = "".join(c.__doc__ or "" for c in kind.__mro__)
        for option in dataclasses.fields(kind):
            assert f"{option.name}: " in documented, (kind, option.name)


def test_importing_edits_is_light() -> None:
    code = (
        "import sys, salve_lm.edits, salve_lm.features, salve_lm.edits.export; "
        "heavy = {'lightning', 'sae_lens', 'pandas', 'scipy', 'transformers', 'torchvision'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
