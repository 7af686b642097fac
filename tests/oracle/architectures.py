"""Options with which every architecture is compared: its own terms all matter at these sizes."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "linear_l1": {"l1_coefficient": 0.3},
    "standard": {"l1_coefficient": 0.3},
    "topk": {"k": 4},
    "batchtopk": {"k": 3.5},
    "gated": {"l1_coefficient": 0.3},
    "jumprelu": {"l0_coefficient": 0.1, "jumprelu_bandwidth": 2.0},
    "matryoshka_batchtopk": {"k": 4},
}
