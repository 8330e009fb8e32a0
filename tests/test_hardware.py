"""What the machine is good at, and how much fits on it."""

import subprocess
import sys

import pytest
import torch

from hfspeech import hardware
from hfspeech.hardware import can_train_in_bf16, keep_freed_memory, most_seconds_that_fit


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Garbage of the other tests is none of the search's business, and takes a while."""
    monkeypatch.setattr(hardware.gc, "collect", lambda: None)


def search(limit_s, first=1.0, most=3600.0):
    """Returns what is found where so many seconds fit, and everything that was tried."""
    tried = []

    def try_seconds(seconds):
        tried.append(seconds)
        if seconds > limit_s:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return most_seconds_that_fit(try_seconds, first, most), tried


@pytest.mark.parametrize("limit_s", [1.0, 1.3, 1.99, 2.0, 7.7, 30.0, 31.0, 100.0, 999.0, 3599.0])
def test_the_search_ends_just_below_what_fits(limit_s):
    found, tried = search(limit_s)
    assert found <= limit_s
    assert found >= max(1.0, 0.85 * limit_s)
    assert len(tried) < 20


def test_nothing_fits():
    found, tried = search(0.9)
    assert found is None and tried == [1.0]


def test_no_more_is_tried_than_there_is_to_gain():
    found, tried = search(1e9, first=30.0, most=100.0)
    assert max(tried) == 100.0 and 85 <= found <= 100


def test_another_fault_is_not_taken_for_a_full_memory():
    def broken(seconds):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        most_seconds_that_fit(broken, 1.0, 10.0)


@pytest.mark.parametrize(
    "has_amx, has_avx512_bf16, d_model, is_faster, words",
    [
        (False, False, 1280, False, "without instructions"),
        (True, False, 128, False, "width 128"),
        (False, True, 128, False, "width 128"),
        (True, False, 384, True, "has instructions"),
        (False, True, 384, True, "has instructions"),
    ],
)
def test_bf16_on_a_cpu_is_for_its_instructions_and_wide_models(
    monkeypatch, has_amx, has_avx512_bf16, d_model, is_faster, words
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    found, sentence = can_train_in_bf16(d_model)
    assert found is is_faster and words in sentence
    assert sentence.startswith("bf16: " if is_faster else "fp32: no GPU")


def test_keeping_freed_memory_can_be_asked_again_and_again():
    code = (
        "import torch\nfrom hfspeech.hardware import keep_freed_memory\n"
        "for _ in range(2):\n    keep_freed_memory()\n    torch.zeros(50_000_000).add_(1)\nprint('well')"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert done.stdout == "well\n", done.stderr


def test_elsewhere_than_with_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
