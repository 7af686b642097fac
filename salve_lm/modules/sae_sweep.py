"""Which autoencoders a group trains: sites times a grid of settings, or members one by one."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from salve_lm.errors import BadConfig, NameNotFound
from salve_lm.modules.sae import SAETraining

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_ELSEWHERE = {
    "out": "each member is saved under the group's own `out`, in a folder of its name",
    "d_in": "it is the width of the site",
    "site": "name sites in `sites` or in `members`",
}


class Member(NamedTuple):
    """One autoencoder of a group.

    Attributes:
        name: of its folder and its metrics.
        site: where its activations are read.
        arguments: of `SAETraining`.
    """

    name: str
    site: str
    arguments: dict[str, Any]


def members_of(
    sites: Sequence[str],
    shared: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]] | None = None,
    members: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Member]:
    """All members of a group.

    Without `members`: one for each site and each combination of the sweep's values, called by its
    site (where there are several) and by the swept values: `resid_post.3-k_32-seed_1`.

    Args:
        sites: the sites of the data.
        shared: arguments of `SAETraining` that all have.
        sweep: argument of `SAETraining`, or option of the architecture -> values to try.
        members: name -> arguments that differ from the shared ones, and its `site` where the data
            have several.

    Raises:
        NameNotFound: an argument or site that does not exist.
        BadConfig: a sweep beside members, an empty one, names that are no folder names, or two
            members that are the same.
    """
    if members and sweep:
        raise BadConfig("Give either a `sweep` or `members`, not both.")
    if members:
        found = [_single(name, dict(given), sites, shared) for name, given in members.items()]
    else:
        found = _grid(sites, shared, dict(sweep or {}))
    for member in found:
        if not _NAME.fullmatch(member.name):
            raise BadConfig(
                f"{member.name!r} is no name for a member: it becomes the name of a folder. Use "
                "letters, digits and . _ - = +."
            )
    twice = _repeated([m.name for m in found]) or _repeated([str(m[1:]) for m in found])
    if twice:
        raise BadConfig(f"Two members of the group are the same: {twice}. Remove one.")
    return found


def _repeated(values: list[str]) -> str | None:
    return next((v for v in values if values.count(v) > 1), None)


def _single(
    name: str, given: dict[str, Any], sites: Sequence[str], shared: Mapping[str, Any]
) -> Member:
    site = given.pop("site", None)
    if site is None and len(sites) > 1:
        raise BadConfig(f"Member {name!r} needs a `site`: the data have {', '.join(sites)}.")
    if site is not None and site not in sites:
        raise NameNotFound("site of the data", site, sites, f"(For member {name!r}.)")
    options = {**(shared.get("options") or {}), **(given.pop("options", None) or {})}
    arguments = dict(shared)
    for key, value in given.items():
        arguments[key] = value_of(key, value)
    return Member(name, site or sites[0], {**arguments, "options": options})


def _grid(
    sites: Sequence[str], shared: Mapping[str, Any], sweep: dict[str, Sequence[Any]]
) -> list[Member]:
    for key, values in sweep.items():
        if not isinstance(values, list | tuple) or not values:
            raise BadConfig(f"sweep: give {key!r} a list of one or more values, not {values!r}.")
    found = []
    for site, values in itertools.product(sites, itertools.product(*sweep.values())):
        arguments = {**shared, "options": dict(shared.get("options") or {})}
        for key, value in zip(sweep, values, strict=True):
            if key in _arguments():
                arguments[key] = value_of(key, value)
            else:
                # an option's name is checked when the autoencoder is built
                arguments["options"][key] = value
        swept = [f"{key}_{value}" for key, value in zip(sweep, values, strict=True)]
        parts = [site] if len(sites) > 1 or not swept else []
        name = re.sub(r"[:/ ]", "+", "-".join([*parts, *swept]))
        found.append(Member(name, site, arguments))
    return found


def value_of(key: str, value: Any) -> Any:
    """`value` as argument `key` of `SAETraining`; YAML reads 1e-3 as a text.

    Raises:
        NameNotFound: no such argument.
        BadConfig: an argument that is set elsewhere, or a text where a number is needed.
    """
    if key in _ELSEWHERE:
        raise BadConfig(f"Remove {key!r} from the member's arguments: {_ELSEWHERE[key]}.")
    known = _arguments()
    if key not in known:
        raise NameNotFound("argument of SAETraining", key, known)
    if isinstance(value, str) and str(known[key].annotation).startswith("float"):
        try:
            return float(value)
        except ValueError as e:
            raise BadConfig(f"{key} must be a number, not {value!r}.") from e
    return value


def _arguments() -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(SAETraining).parameters
    return {name: p for name, p in parameters.items() if name not in _ELSEWHERE}
