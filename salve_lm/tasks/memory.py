"""Out of memory: try again with half as much at once, and say so."""

from __future__ import annotations

import gc
import logging

import torch

from salve_lm.errors import SalveError

logger = logging.getLogger(__name__)


class OutOfMemory(SalveError, RuntimeError):
    """Not even one row at once fits into the device's memory."""


class RowLimit:
    """How many rows a task runs at once: halved whenever memory runs out, for good.

    Args:
        rows: the most at once.
        what: names the task in messages.
    """

    def __init__(self, rows: int, what: str) -> None:
        self.rows, self._what = rows, what

    def halve(self) -> None:
        """Note that `rows` did not fit. Call it after the handler, so that its tensors are freed.

        Raises:
            OutOfMemory: a single row does not fit.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.rows == 1:
            raise OutOfMemory(
                f"{self._what} ran out of memory with a single row. Lower max_new_tokens or the "
                "context, load the model in bfloat16 (dtype: bfloat16), or spread it over devices "
                "(device_map: auto)."
            )
        logger.warning(
            "%s ran out of memory with %d rows at once: going on with %d.",
            self._what, self.rows, self.rows // 2,
        )  # fmt: skip
        self.rows //= 2
