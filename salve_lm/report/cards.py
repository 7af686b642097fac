"""Cards of single features: the images that excite a latent, and where in them it looks.

`RUN/cards/cards.json` and the images beside it; see `docs/formats/run.md`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from salve_lm.errors import CorruptFile, MissingFile
from salve_lm.report.limits import MAX_CARDS
from salve_lm.report.markup import clip, finite, left_out, section, text
from salve_lm.report.material import check_format, read_json

FORMAT = "salve_lm.cards"
VERSION = 1
TOP = 6  # images of a card
EXTRA = ("overlay", "crop")  # further images of a sample
HOW_TO = (
    "This run has no <code>cards/cards.json</code>. Validate with the callback "
    "<code>vision.FeatureCards</code> and <code>out: RUN/cards</code>: it writes the images that "
    "excite each latent, Grad-FAM overlays of them, a maximised image, and deletion and insertion "
    "figures. Then run <code>python -m salve_lm report RUN</code> again."
)
REDO = "Make the cards again (validate with vision.FeatureCards)."
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
SMALL = 24 * 1024  # bytes up to which an image is embedded as it is
LONGEST_SIDE = 192  # pixels a larger one is reduced to: twice its size on the page
PIXELATED_BELOW = 64  # pixels: smaller images show their pixels rather than a blur


class Cards(NamedTuple):
    """The cards of a run, checked."""

    folder: Path
    latents: list[dict[str, Any]]


def read_cards(run: Path) -> Cards | None:
    """The cards of `run`, or None without any.

    Raises:
        CorruptFile: another format or version, or entries that are no cards.
        MissingFile: an image that `cards.json` names is not there.
    """
    path = run / "cards/cards.json"
    if not path.is_file():
        return None
    data = read_json(path)
    check_format(path, data, FORMAT, VERSION, "validate with vision.FeatureCards")
    latents = data.get("latents")
    if not isinstance(latents, list) or not all(_is_card(c) for c in latents):
        why = "expected latents: a list of cards with latent, class, sign and top"
        raise CorruptFile(path, why, REDO)
    there = {p.name for p in path.parent.iterdir()}
    for card in latents:
        for name in _images(card):
            # a plain name, so that a card cannot pull other files into a page that is mailed
            if name != Path(name).name:
                raise CorruptFile(path, f"{name!r} is not a file in its folder")
            if name not in there:
                raise MissingFile(
                    f"{path} names {name}, which is not in {path.parent}. "
                    f"{REDO} Or copy the whole folder."
                )
    return Cards(path.parent, latents)


def cards_section(cards: Cards | None, edited: Sequence[int], budget: int) -> str:
    """The section with the cards.

    Args:
        cards: what `read_cards` found.
        edited: latents that the run's edits read; their cards come first.
        budget: bytes of embedded images at most.
    """
    title = "What the features look at"
    if cards is None or not cards.latents:
        return section("cards", title, HOW_TO)
    order = {latent: i for i, latent in reversed(list(enumerate(edited)))}
    latents = sorted(cards.latents, key=lambda c: order.get(c["latent"], len(order)))
    shown: list[str] = []
    for card in latents[:MAX_CARDS]:
        images = {name: _embed(cards.folder / name) for name in _images(card)}
        budget -= sum(map(len, images.values()))
        if budget < 0:
            break
        shown.append(_card(card, images, card["latent"] in order))
    return section(
        "cards",
        title,
        "One card a latent: the samples that excite it most, with the place it looks at (Grad-FAM) "
        "below; the crops that the maxima of those maps see, beside an image made to excite it. "
        "<b>Deletion</b>: mean activation (1: whole image, 0: blank one) while pixels are taken "
        "away, highlighted first; lower is better. <b>Insertion</b>: while they are put back; "
        "higher is better. A heatmap says something only where it beats the random order beside "
        "it.",
        f'<div class="cards">{"".join(shown)}</div>',
        left_out(len(shown), len(latents), "cards", "latents that the edits use first"),
    )


def _is_card(card: Any) -> bool:
    return (
        isinstance(card, dict)
        and isinstance(card.get("latent"), int)
        and isinstance(card.get("top"), list)
        and all(isinstance(t, dict) and isinstance(t.get("image"), str) for t in card["top"])
        and all(
            isinstance(name, str | None)
            for name in (card.get("maximised"), *(t.get(k) for t in card["top"] for k in EXTRA))
        )
    )


def _images(card: Mapping[str, Any]) -> list[str]:
    top = [t.get(k) for t in card["top"][:TOP] for k in ("image", *EXTRA)]
    return list(dict.fromkeys(name for name in (*top, card.get("maximised")) if name))


def _card(card: Mapping[str, Any], images: Mapping[str, str], edited: bool) -> str:
    sign = {1: " (+)", -1: " (−)"}.get(card.get("sign", 0), "")
    used = '<span class="chip">edited</span>' if edited else ""
    strip = "".join(_sample(t, images) for t in card["top"][:TOP])
    silent = (
        ""
        if card["top"]
        else '<p class="figures">No sample drives it this way, so there is no map.</p>'
    )
    strip += _crops(card, images)
    if card.get("maximised"):
        alt = f"image made to excite latent {card['latent']}"
        strip += (
            f'<figure class="max">{_img(images[card["maximised"]], alt)}'
            "<figcaption>maximised</figcaption></figure>"
        )
    return (
        f'<article class="card"><h3>latent {card["latent"]}{used}'
        f"<small>{text(card.get('class', ''))}{sign}</small></h3>"
        f'<div class="samples">{strip}</div>{silent}{_figures(card)}</article>'
    )


def _crops(card: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """What the maxima of the heatmaps see, side by side; empty where no card has them."""
    shown = [
        _img(images[t["crop"]], f"crop of sample {t.get('source', '')}")
        for t in card["top"][:TOP]
        if t.get("crop")
    ]
    if not shown:
        return ""
    return (
        f'<figure class="crops"><span>{"".join(shown)}</span>'
        "<figcaption>crops at the maxima</figcaption></figure>"
    )


def _sample(top: Mapping[str, Any], images: Mapping[str, str]) -> str:
    source = str(top.get("source", ""))
    caption = f"{text(top.get('class', ''), 12)}"
    activation = finite(top.get("activation"))
    if activation is not None:
        caption += f"<br>{activation:.3g}"
    overlay = top.get("overlay")
    return (
        f'<figure title="{clip(source, 400)}">{_img(images[top["image"]], "sample " + source)}'
        + (_img(images[overlay], "where the latent looks") if overlay else "")
        + f"<figcaption>{caption}</figcaption></figure>"
    )


def _figures(card: Mapping[str, Any]) -> str:
    parts = []
    for name, lower_is_better in (("deletion", True), ("insertion", False)):
        found, chance = (finite(card.get(f"{p}{name}_auc")) for p in ("", "random_"))
        if found is None:
            continue
        against = ""
        if chance is not None:
            beats = found < chance if lower_is_better else found > chance
            mark = "better than" if beats else "no better than"
            against = f" <small>{mark} random {chance:.2f}</small>"
        parts.append(f"<span>{name} <b>{found:.2f}</b>{against}</span>")
    return f'<p class="figures">{"".join(parts)}</p>' if parts else ""


def _img(uri: str, alt: str) -> str:
    # `_embed` marks tiny images, which would be blurred when enlarged, in the address itself
    css = ' class="px"' if "#px" in uri else ""
    return f'<img{css} src="{uri}" alt="{clip(alt, 120)}">'


def _embed(path: Path) -> str:
    """The image as a data address; large ones reduced and as JPEG."""
    raw = path.read_bytes()
    if not raw.startswith((PNG, JPEG)):
        raise CorruptFile(path, "neither a PNG nor a JPEG image", REDO)
    kind, suffix = ("png", _pixelated(raw)) if raw.startswith(PNG) else ("jpeg", "")
    if len(raw) > SMALL:
        raw, kind, suffix = _reduced(path, raw), "jpeg", ""
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}{suffix}"


def _pixelated(png: bytes) -> str:
    # the header of a PNG: signature, length and name of the first chunk, then width and height
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    return "#px" if max(width, height) < PIXELATED_BELOW else ""


def _reduced(path: Path, raw: bytes) -> bytes:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as image:
            small = image.convert("RGB")
            small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=85)
            return out.getvalue()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise CorruptFile(path, f"a damaged image ({e})", REDO) from e
