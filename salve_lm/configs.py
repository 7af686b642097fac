"""Shipped configs, called by name: `--config demo/1_backbone`."""

from __future__ import annotations

from pathlib import Path

from salve_lm.errors import NameNotFound

_PACKAGE = Path(__file__).parent
# in a wheel the configs lie inside the package; in a checkout beside it
ROOT = next(
    (
        p
        for p in (_PACKAGE / "lightning_configs", _PACKAGE.parent / "lightning_configs")
        if p.is_dir()
    ),
    _PACKAGE / "lightning_configs",
)


def list_configs() -> list[str]:
    """Names of the shipped configs, without ending, sorted."""
    return sorted(str(p.relative_to(ROOT).with_suffix("")) for p in ROOT.rglob("*.yaml"))


def find_config(name: str) -> str:
    """Path of the config `name`: a file, or else the shipped config of that name.

    Raises:
        NameNotFound: neither exists.
    """
    if Path(name).is_file():
        return name
    for candidate in (ROOT / name, ROOT / f"{name}.yaml"):
        if candidate.is_file():
            return str(candidate)
    raise NameNotFound("config file", name, list_configs())


def named_configs(args: list[str]) -> list[str]:
    """`args` with the value of every `--config` replaced by the path it stands for."""
    out: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if out and out[-1] in ("--config", "-c"):
            out.append(find_config(arg))
        elif equals and flag in ("--config", "-c"):
            out.append(f"{flag}={find_config(value)}")
        else:
            out.append(arg)
    return out
