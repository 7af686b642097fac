"""`report.html`: whole, self-contained, honest, and small whatever the run holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from salve_lm.errors import CorruptFile, MissingFile
from salve_lm.report.charts import LogAxis
from salve_lm.report.limits import MAX_BYTES, most_telling
from salve_lm.report.summary import report
from tests.report.made_run import DIGITS, EDITS, make_cards, make_run, png

VOID = {"meta", "img", "br", "line", "rect", "circle", "path", "polyline"}
SECTIONS = {"edits", "removal", "curves", "thresholds", "side-effects", "cards", "repeat"}


class Page(HTMLParser):
    """The elements of a page; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.ids |= {given["id"]} if given.get("id") else set()
        self.links += [str(given[k]) for k in ("src", "href", "action", "data") if k in given]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "


def made(run: Path) -> tuple[str, Page]:
    report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_cards(run, 3)
    html, page = made(run)
    assert page.ids == SECTIONS
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} == SECTIONS
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    assert page.count["svg"] == 3 * len(DIGITS) + len(DIGITS) + 1  # curves, strips, their axis
    assert page.count["article"] == 3
    for word in ("resnet18 on Digits", "95.0 %", "class row zeroed", "62.5", "0.0 to 4.1",
                 "cd" * 32, "python -m salve_lm fit", "Digits", "2.6.6", "digits/"):  # fmt: skip
        assert word in page.text or word in html, word


def test_summary_gains_the_promised_keys(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    report(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["report"] == str(run / "report.html")
    assert summary["labels"]["suppress:three"] == {
        "label": "suppressed",
        "recoverability": 1.0,
        "runner_up_share": 0.98,
    }
    assert {"target_accuracy_after", "other_accuracy_after"} <= set(
        summary["controls"]["class row zeroed"]
    )


def test_every_chart_is_drawn_within_its_box(tmp_path: Path) -> None:
    html, _ = made(make_run(tmp_path / "run"))
    points = re.findall(r'<polyline class="[^"]+" points="([^"]+)"', html)
    assert len(points) == 3 * len(DIGITS) * 4
    for line in points:
        xy = [tuple(map(float, p.split(","))) for p in line.split()]
        assert len(xy) == 5
        assert all(0 <= x <= 230 and 0 <= y <= 147 for x, y in xy)
        assert [x for x, _ in xy] == sorted(x for x, _ in xy)
    # alpha is logarithmic: 1 -> 5 takes as much room as 20 -> 100
    x = [float(p.split(",")[0]) for p in points[0].split()]
    assert x[2] - x[1] == pytest.approx(x[4] - x[3], abs=0.2)


def test_side_effects_are_the_change_of_each_class(tmp_path: Path) -> None:
    html, _ = made(make_run(tmp_path / "run"))
    heat = html.split('id="side-effects"')[1].split("</table>")[0]
    row = next(r for r in heat.split("<tr")[1:] if ">erase<" in r and '"row">one<' in r)
    assert re.sub(r"<[^>]*>", " ", row.split(">", 1)[1]).split() == [
        "erase", "one", "−2.0", "−94.0", "−2.0", "−2.0"]  # fmt: skip


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        (EDITS, "zeroing the class's row of the head does the same"),
        ({k: v for k, v in EDITS.items() if k != "class row zeroed"}, "beats every control"),
        ({"suppress": EDITS["suppress"]}, "Nothing was run to compare the edits with"),
        (EDITS | {"suppress": ("DecoderGuided", False, "suppress", 0.6, 0.0),
                  "erase": ("LatentContrastErasure", False, "suppress", 0.9, 0.0)},
         "No edit switches its classes off"),
        ({"enhance": EDITS["enhance"]}, "This run suppresses no class"),
    ],
)  # fmt: skip
def test_verdict_is_honest(edits: dict, says: str, tmp_path: Path) -> None:
    _, page = made(make_run(tmp_path / "run", edits=edits))
    assert says in page.text


def test_labels_are_missed_where_nobody_measured_them(tmp_path: Path) -> None:
    _, page = made(make_run(tmp_path / "run", labelled=False))
    assert "no edit here may be called a removal" in page.text
    assert page.ids == SECTIONS - {"removal"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["labels"] == {}


def test_an_edit_that_reaches_the_features_gets_its_due(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "sweep/removal.json"
    entries = json.loads(path.read_text())
    kept = entries[3] | {"edit": "erase"}
    erased = [e | {"edit": "erase", "label": "linearly erased"} for e in entries[:3]]
    path.write_text(json.dumps([*entries, *erased, kept]))
    _, page = made(run)
    assert "4 × suppressed" in page.text.split("The controls")[1]
    assert (
        "class row zeroed"
        not in page.text.split("What is left in the features")[1].split("Nothing was")[0]
    )
    assert "Only “erase” also changes what the features hold" in page.text
    assert "3 × linearly erased, 1 × suppressed" in page.text
    assert "Nothing was removed" in page.text


def test_axis_is_logarithmic() -> None:
    axis = LogAxis.over([0.0, 0.1, 1000.0, float("inf")])
    assert (axis.low, axis.high) == (0.1, 1000.0)
    assert axis.place(10.0) == pytest.approx(0.5)
    assert axis.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])
    assert LogAxis.over([0.5, 4.0]).ticks() == pytest.approx([0.5, 1, 2])
    lone = LogAxis.over([3.0])
    assert lone.place(3.0) == pytest.approx(0.5)


def test_class_names_cannot_inject_markup(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", 'a"b&c', "x" * 300]
    html, page = made(make_run(tmp_path / "run", classes=names))
    assert "<script" not in html
    assert "script" not in page.count


def test_ten_thousand_cards_stay_small_and_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_cards(run, 10_000, png(224))
    html, page = made(run)
    assert len(html.encode()) < MAX_BYTES
    left = re.search(r"(\d+) of 10,000 cards shown .*?; ([\d,]+) left out", page.text)
    assert left
    assert int(left[1]) + int(left[2].replace(",", "")) == 10_000
    # the latents of the edits (0 to 3) come first
    assert re.findall(r"latent (\d+)", page.text)[:4] == ["0", "1", "2", "3"]


def test_a_thousand_classes_stay_small_and_say_so(tmp_path: Path) -> None:
    names = [f"class {k}" for k in range(1000)]
    edits = {k: EDITS[k] for k in ("suppress", "class row zeroed")}
    html, page = made(make_run(tmp_path / "run", names, edits))
    assert len(html.encode()) < MAX_BYTES
    for note in ("100 of 1,000 classes shown", "24 of 100 classes", "20 of 1,000 classes across"):
        assert note in page.text or note.replace("of 100 ", "of 1,000 ") in page.text, note


def test_the_worst_classes_are_never_left_out() -> None:
    edits = [
        {"target_class": str(k), "direction": "suppress", "target_accuracy_after": k == 7,
         "other_accuracy_before": 0.9, "other_accuracy_after": 0.5 if k == 3 else 0.9}
        for k in range(10)
    ]  # fmt: skip
    assert most_telling(edits, 2) == ["3", "7"]
    assert most_telling(edits, 10) == [str(k) for k in range(10)]


def test_large_images_are_reduced_small_ones_kept_with_their_pixels(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = make_cards(run, 1)
    (folder / "top.png").write_bytes(png(600))
    html, _ = made(run)
    assert html.count("data:image/jpeg") == 2  # the two samples
    assert html.count('<img class="px" src="data:image/png') == 5  # overlays, crops, maximised
    assert max(map(len, re.findall(r'src="([^"]+)"', html))) < 64 * 1024


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("sweep/removal.json", "[{", "not readable as JSON"),
        ("sweep/removal.json", '{"a": 1}', "expected a list of entries"),
        ("cards/cards.json", "{", "not readable as JSON"),
        ("cards/cards.json", '{"format": "salve_lm.cards", "version": 9}', "version 9"),
        ("cards/cards.json", '{"format": "other"}', "format is not salve_lm.cards"),
        ("cards/cards.json", '{"format": "salve_lm.cards", "version": 1, "latents": [1]}', "cards"),
        ("features/index.json", '{"format": "salve_lm.features", "version": 2}', "version 2"),
        ("exported/edit.json", '{"format": "else", "version": 1}', "format is not salve_lm.edit"),
        ("thresholds/critical_thresholds.json", "[1]", "not what the stages write"),
        ("backbone/config.yaml", "a: [", "not readable as YAML"),
        ("cards/top.png", "no image", "neither a PNG nor a JPEG"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(
    name: str, content: str, says: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    make_cards(run, 1)
    (run / name).write_text(content)
    with pytest.raises(CorruptFile, match=says) as e:
        report(run)
    assert name in str(e.value) or "stages" in str(e.value)
    assert not (run / "report.html").exists()
    assert not (run / "summary.json").exists()


def test_a_damaged_large_image_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (make_cards(run, 1) / "top.png").write_bytes(png(600)[:40_000])
    with pytest.raises(CorruptFile, match=r"top\.png"):
        report(run)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (make_cards(run, 1) / "max.png").unlink()
    with pytest.raises(MissingFile, match=r"names max\.png"):
        report(run)


def test_cards_cannot_reach_out_of_their_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = make_cards(run, 1) / "cards.json"
    path.write_text(path.read_text().replace("max.png", "../secret.png"))
    with pytest.raises(CorruptFile, match="not a file in its folder"):
        report(run)


def test_an_incomplete_run_names_the_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "sweep/curves.parquet").unlink()
    with pytest.raises(MissingFile, match="sweep"):
        report(run)


def test_classes_without_samples_and_unused_edits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "sweep/results.csv"
    results = pd.read_csv(path)
    results.loc[results["target_class"] == "two", ["alpha"]] = 0.0
    results.loc[results["target_class"] == "one", ["val_target_after", "val_target_before"]] = None
    results.to_csv(path, index=False)
    _, page = made(run)
    assert "For 1 of them no strength was acceptable" in page.text
    assert "no strength accepted" in page.text


def test_crops_stand_beside_the_maximised_image(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = make_cards(run, 2) / "cards.json"
    html, _ = made(run)
    assert html.count('<figure class="crops">') == 2
    assert html.count('alt="crop of sample digits/0"') == 2
    # cards made before there were crops
    path.write_text(path.read_text().replace('"crop": "crop.png", ', ""))
    html, page = made(run)
    assert '<figure class="crops">' not in html and page.count["article"] == 2


def test_an_enhancement_without_gain_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, page = made(run)
    assert "no strength raised the training accuracy" not in page.text
    path = run / "sweep/results.csv"
    results = pd.read_csv(path)
    mine = (results["edit"] == "enhance") & results["target_class"].isin(["one", "two"])
    results.loc[mine, "train_target_after"] = results.loc[mine, "train_target_before"]
    results.to_csv(path, index=False)
    _, page = made(run)
    assert "For 2 of them no strength raised the training accuracy" in page.text
    assert page.text.count("no gain in training") == 2
    raised = {e["name"]: e["raised_on_training"] for e in
              json.loads((run / "summary.json").read_text())["edits"]}  # fmt: skip
    assert raised["enhance:zero"] is True and raised["enhance:one"] is False
    assert raised["suppress:one"] is None


def test_the_page_does_not_say_where_the_run_lies_on_a_machine(tmp_path: Path) -> None:
    html, _ = made(make_run(tmp_path / "secret" / "mine"))
    assert str(tmp_path) not in html and "secret" not in html
    assert "python -m salve_lm report mine" in html


@pytest.mark.parametrize("file", ["features/features.safetensors", "exported/model.safetensors"])
def test_weights_that_were_changed_afterwards_are_named(file: str, tmp_path: Path) -> None:
    from salve_lm.hashing import hash_file

    run = make_run(tmp_path / "run")
    (run / file).write_bytes(b"weights")
    index = run / ("features/index.json" if "features" in file else "exported/edit.json")
    record = json.loads(index.read_text())
    record["sha256"] = {Path(file).name: hash_file(run / file)}
    index.write_text(json.dumps(record))
    made(run)
    (run / file).write_bytes(b"other")
    with pytest.raises(CorruptFile, match="changed or cut off since") as e:
        report(run)
    assert file in str(e.value)
    (run / file).unlink()
    if "exported" in file:
        made(run)  # the weights may have been moved to where they are used
    else:
        with pytest.raises(MissingFile, match=r"features\.safetensors, which is gone"):
            report(run)
