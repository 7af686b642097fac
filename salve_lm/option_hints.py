"""What a mistyped value of an option with a fixed set of values probably meant."""

from __future__ import annotations

import ast
import re

from salve_lm.errors import nearest

# as jsonargparse words it
_REFUSED = re.compile(r"Expected a typing\.Literal(\[[^\]]*\])\. Got value: (\S+)")


def hint(message: str) -> str:
    """A last line such as "Did you mean 'cosine'?" for an error of jsonargparse; or nothing.

    Of several complaints (a union is tried type by type) the last that has a near value counts.
    """
    for choices, value in reversed(_REFUSED.findall(message)):
        try:
            known = [str(c) for c in ast.literal_eval(choices)]
        except (ValueError, SyntaxError):
            continue
        near = nearest(value, known, n=1)
        if near:
            return f"\nDid you mean {near[0]!r} for {value!r}?"
    return ""
