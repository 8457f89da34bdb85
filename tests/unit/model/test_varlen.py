"""Which kernel for packed attention a process takes, with fake modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo_async.model.varlen import FLASH, varlen_kernel

WORKS = """
def flash_attn_varlen_func(query, key, value, *limits, causal):
    assert causal and len(limits) == 4
    return {result}
"""
BROKEN = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')"
NOTHING = "raise OSError('libcudart.so.12: cannot open shared object file')"
NONE_INSTALLED = "flash_attn_interface is not installed, flash_attn is not installed"


def forget() -> None:
    varlen_kernel.cache_clear()
    for name in FLASH.values():
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    forget()
    yield
    forget()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    monkeypatch.syspath_prepend(folder)
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    importlib.invalidate_caches()


def called() -> Tensor:
    query, key, value = (torch.full((3, 2, 4), float(number)) for number in range(3))
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    return varlen_kernel().call(query, key, value, (offsets, offsets, 3, 3))


@pytest.mark.parametrize(
    ("modules", "note", "result"),
    [
        (
            {
                "flash_attn_interface": WORKS.format(result="(value, None)"),
                "flash_attn": WORKS.format(result="key"),
            },
            "FlashAttention 3",
            2.0,
        ),
        (
            {"flash_attn": WORKS.format(result="key")},
            "FlashAttention 2, flash_attn_interface is not installed",
            1.0,
        ),
        (
            {"flash_attn_interface": BROKEN, "flash_attn": WORKS.format(result="key")},
            "FlashAttention 2, flash_attn_interface does not import: ImportError: "
            "flash_attn_2_cuda.so: undefined symbol: _ZN3c10",
            1.0,
        ),
    ],
    ids=["3 before 2", "2 alone", "2 for a broken 3"],
)
def test_the_newest_flash_attention_that_imports_is_taken(
    modules: dict[str, str],
    note: str,
    result: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path, monkeypatch, **modules)
    assert varlen_kernel().note == note
    assert torch.equal(called(), torch.full((3, 2, 4), result))


def fake_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *limits: Any,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert window_size == (-1, 0)
        return value + 10

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        ({}, NONE_INSTALLED),
        (
            {"flash_attn": NOTHING},
            "flash_attn_interface is not installed, flash_attn does not import: OSError: "
            "libcudart.so.12: cannot open shared object file",
        ),
        (
            {"flash_attn": "", "flash_attn_interface": ""},
            "flash_attn_interface does not import: AttributeError: module 'flash_attn_interface' "
            "has no attribute 'flash_attn_varlen_func', flash_attn does not import: "
            "AttributeError: module 'flash_attn' has no attribute 'flash_attn_varlen_func'",
        ),
    ],
    ids=["none", "broken", "without the function"],
)
def test_torchs_kernel_is_taken_where_no_flash_attention_imports(
    modules: dict[str, str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torchs(monkeypatch)
    install(tmp_path, monkeypatch, **modules)
    assert varlen_kernel().note == f"torch's varlen attention, {why}"
    assert torch.equal(called(), torch.full((3, 2, 4), 12.0))


def test_flash_attention_3_is_for_hopper_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, flash_attn_interface=WORKS.format(result="value"))
    fake_torchs(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, note in (((9, 0), "FlashAttention 3"), ((8, 0), "torch's varlen attention, ")):
        varlen_kernel.cache_clear()
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda c=capability: c)
        assert varlen_kernel().note.startswith(note)
    assert "flash_attn_interface is not for a GPU of compute capability 8.0" in varlen_kernel().note
