"""Write a trained language model as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.errors import OutputExists

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "salve_lm_training.json"
# what a model with images needs beside weights and tokenizer
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path,
    *,
    source: str | Path | None,
    tokenizer_source: str | Path | None,
    record: Mapping[str, Any],
    replace: bool = False,
) -> None:
    """Write weights (or a LoRA adapter), configuration, tokenizer and `salve_lm_training.json`.

    Args:
        model: the model, or peft's wrapper around it, of which only the adapter is written.
        tokenizer: written beside it.
        out: folder to write.
        source: folder of the model before training, whose image settings are carried over.
        tokenizer_source: folder of the tokenizer, whose files are carried over as they are. Of a
            public name, the tokenizer is written anew.
        record: plain values on how it was trained.
        replace: put the new folder in the place of an existing one.

    Raises:
        OutputExists: `out` is there already, and not `replace`.
        OutputUnwritable: no permission or no space.
    """
    out = Path(out)
    if replace and out.exists():
        shutil.rmtree(out)
    with atomic_folder(out) as folder:
        model.save_pretrained(str(folder))
        _carry_over(_PROCESSOR, source, folder)
        # saved anew, a tokenizer differs from its source: transformers rewrites some fields
        if not _carry_over(_TOKENIZER, tokenizer_source, folder) and tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # peft's card is a form with nothing filled in
        (folder / "README.md").unlink(missing_ok=True)
        text = json.dumps(record, indent=2, sort_keys=True)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def check_out(out: str | Path, run: str, resumed: bool) -> None:
    """Fail before training if `out` is there, unless this very run wrote it and goes on.

    Raises:
        OutputExists: it is there, from elsewhere.
        OutputUnwritable: it cannot be created.
    """
    out = Path(out)
    if not (resumed and out.exists()):
        check_writable_target(out)
        return
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != run:
        raise OutputExists(out)


def _carry_over(names: Iterable[str], source: str | Path | None, folder: Path) -> bool:
    """Copy those of the files that `source` has; whether there was one."""
    found = [n for n in names if source is not None and (Path(source) / n).is_file()]
    for name in found:
        shutil.copyfile(Path(str(source)) / name, folder / name)
    return bool(found)
