"""Kubernetes resource quantities, as in the API machinery's `resource.Quantity` (decimal, binary and exponent forms).

Upstream's Docker runtime also read `2g` and `512mb`, which are not quantities; those two unambiguous spellings stay
accepted. `512m` of memory is refused: as a quantity it is 0.512 bytes, and upstream read it as 512 million bytes.
"""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(
    r"\+?(?P<number>\d{1,18}(?:\.\d{0,9})?|\.\d{1,9})(?P<suffix>[a-zA-Z]{0,2}|[eE][-+]?\d{1,2})", re.ASCII
)
ALL_GPUS = -1
_SCALE: dict[str, Decimal] = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}
_UPSTREAM = {
    "k": "k",
    "kb": "k",
    "mb": "M",
    "gb": "G",
    "tb": "T",
    "g": "G",
    "t": "T",
    "ki": "Ki",
    "mi": "Mi",
    "gi": "Gi",
    "ti": "Ti",
}


def parse_quantity(text: str) -> Decimal:
    """The value of a Kubernetes quantity. ValueError says what is wrong, without repeating the text."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError("is not a Kubernetes quantity such as 500m, 2, 512Mi or 2Gi")
    number, suffix = Decimal(match["number"]), match["suffix"]
    if suffix[:1] in ("e", "E") and len(suffix) > 1 and suffix[1:].lstrip("+-").isdigit():
        return number * Decimal(10) ** int(suffix[1:])
    scale = _SCALE.get(suffix)
    if scale is None:
        raise ValueError("has an unknown unit; known are n, u, m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei")
    return number * scale


def parse_memory(text: str) -> int:
    """Bytes. Below 6 MiB is refused, as Docker does; above 2^53, because no payload holds a larger integer."""
    suffix = text.lstrip("0123456789.")
    if suffix == "m":
        raise ValueError("ends in m, which means thousandths; write M or Mi for megabytes")
    if suffix.lower() in _UPSTREAM and suffix not in _SCALE:
        text = text.removesuffix(suffix) + _UPSTREAM[suffix.lower()]
    value = parse_quantity(text)
    if not 6 * 1024 * 1024 <= value <= 2**53:
        raise ValueError("must be at least 6Mi and at most 8Pi")
    return int(value)


def parse_nano_cpus(text: str) -> int:
    """Billionths of a CPU. At least 10m, Docker's least; at most 4096 CPUs."""
    value = parse_quantity(text)
    if not Decimal("0.01") <= value <= 4096:  # noqa: PLR2004
        raise ValueError("must be at least 10m and at most 4096")
    return int(value * 1_000_000_000)


def parse_gpus(text: str) -> int:
    """A number of GPUs, or `all` = `ALL_GPUS`."""
    if text == "all":
        return ALL_GPUS
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ValueError("must be a positive whole number or all")
    return int(text)
