"""Kubernetes quantities, the two other spellings that upstream read, and everything that is neither."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.sandbox.quantity import parse_gpus, parse_memory, parse_nano_cpus, parse_quantity
from app.domain.sandbox.spec import parse_limits
from app.errors import Invalid, Unsupported

GI = 1024**3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("+1", "1"),
        ("1.", "1"),
        (".5", "0.5"),
        ("1.5", "1.5"),
        ("500m", "0.5"),
        ("1n", "0.000000001"),
        ("1u", "0.000001"),
        ("2k", "2000"),
        ("2M", "2000000"),
        ("2G", "2000000000"),
        ("2T", "2e12"),
        ("2P", "2e15"),
        ("2E", "2e18"),
        ("1Ki", "1024"),
        ("1Mi", str(1024**2)),
        ("1Gi", str(GI)),
        ("1Ti", str(1024**4)),
        ("1Pi", str(1024**5)),
        ("1Ei", str(1024**6)),
        ("1e3", "1000"),
        ("1E3", "1000"),
        ("1e+3", "1000"),
        ("1.5e-3", "0.0015"),
    ],
)
def test_kubernetes_forms(text: str, value: str):
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "1 Gi", "1Gi ", "1Gi\n", "Gi", ".", "1..5", "1,5", "0x10", "1e", "1e1.5", "1e999", "1Zi", "1mm",
     "NaN", "inf", "1_000", "\u0661\u0662", "1\u0660Mi", "9" * 19, "1GiB", "1\0"],
)  # fmt: skip
def test_everything_else_is_refused_without_being_repeated(text: str):
    with pytest.raises(ValueError) as caught:
        parse_quantity(text)
    assert len(text) < 3 or text not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512Mi", 512 * 1024**2),
        ("2Gi", 2 * GI),
        ("1.5Gi", 3 * GI // 2),
        ("1e9", 10**9),
        ("1000000000", 10**9),
        ("100000k", 10**8),
        ("100000K", 10**8),
        ("100000kb", 10**8),
        ("2g", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2GB", 2 * 10**9),
        ("512mb", 512 * 10**6),
        ("512MB", 512 * 10**6),
        ("1t", 10**12),
        ("512mi", 512 * 1024**2),
        ("2GI", 2 * GI),
        ("7gi", 7 * GI),
        ("6Mi", 6 * 1024**2),
        ("8Pi", 2**53),
    ],
)
def test_memory_is_bytes_also_in_upstreams_spelling(text: str, value: int):
    assert parse_memory(text) == value


@pytest.mark.parametrize(
    "text", ["0", "1", "5Mi", "6291455", "9Pi", "9007199254740993", "8Ei", "1e30", "512 Mi", "512bytes", "-1Gi", "max"]
)
def test_memory_out_of_bounds_or_of_no_form_is_refused(text: str):
    with pytest.raises(ValueError):
        parse_memory(text)


@pytest.mark.parametrize("text", ["512m", "1000000000m"])
def test_thousandths_of_a_byte_are_a_mistake_that_is_explained(text: str):
    with pytest.raises(ValueError, match="write M or Mi"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 10**9), ("500m", 5 * 10**8), ("0.5", 5 * 10**8), ("1e-2", 10**7), ("4096", 4096 * 10**9)]
)
def test_cpus_are_billionths(text: str, value: int):
    assert parse_nano_cpus(text) == value


@pytest.mark.parametrize("text", ["0", "0.5m", "4097", "1Mi", "two"])
def test_cpus_out_of_bounds_are_refused(text: str):
    with pytest.raises(ValueError):
        parse_nano_cpus(text)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("8", 8), ("all", -1)])
def test_gpus(text: str, value: int):
    assert parse_gpus(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "01", "ALL", "", "1\n", "\u0663", "10000"])
def test_gpus_of_no_form_are_refused(text: str):
    with pytest.raises(ValueError):
        parse_gpus(text)


def test_limits_name_the_key_and_never_the_value():
    assert parse_limits({"cpu": "1", "memory": "1Gi", "gpu": "all"}) == {"cpu": 10**9, "memory": GI, "gpu": -1}
    with pytest.raises(Invalid) as caught:
        parse_limits({"memory": "hunter2"})
    assert "resourceLimits.memory" in caught.value.message
    assert "hunter2" not in caught.value.message
    with pytest.raises(Unsupported):
        parse_limits({"disk": "1Gi"})


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_refusal(text: str):
    for parse in (parse_quantity, parse_memory, parse_nano_cpus, parse_gpus):
        try:
            parse(text)
        except ValueError:
            continue


@given(st.integers(6, 2**33))
def test_binary_units_are_exact(mebibytes: int):
    assert parse_memory(f"{mebibytes}Mi") == mebibytes * 1024**2
