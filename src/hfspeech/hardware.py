"""What the machine is good at, and how much fits on it."""

import ctypes
import gc

import torch

# Narrower models lose more by converting numbers to bf16 than they gain by multiplying them.
LEAST_BF16_WIDTH = 384
# Of the seconds that fit, what is used: memory gets fragmented in a long run.
MEMORY_SHARE = 0.9


def can_train_in_bf16(d_model):
    """Tells whether a CPU trains a model of this width faster in bf16, and why: (bool, sentence).

    CPUs with matrix units (Intel's AMX) or dot products (AVX512_BF16) for it do from whisper-tiny's width on;
    `docs/performance.md` has the figures.
    """
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False, "fp32: no GPU, and a CPU without instructions for bf16"
    if d_model < LEAST_BF16_WIDTH:
        return False, f"fp32: no GPU, and a model of width {d_model} gains nothing by bf16 on a CPU"
    return True, "bf16: the CPU has instructions for it"


def keep_freed_memory():
    """Makes glibc keep large blocks that are freed, instead of handing them back and fetching them anew each step.

    A step frees and allocates tensors of up to some 100 MB, and every page of a fresh one costs a fault. Elsewhere than
    on Linux with glibc nothing happens. The numbers are those of malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never hand back


def most_seconds_that_fit(try_seconds, first, most):
    """Searches the largest batch that fits in memory, by doubling and then halving the distance to within 5 %.

    Args:
        try_seconds: callable that runs one training step on a batch of so many seconds; `torch.OutOfMemoryError` if it
            does not fit.
        first: seconds to begin with, a batch of one row.
        most: seconds beyond which there is nothing to gain.

    Returns:
        Seconds that fit, less a tenth; None if not even `first` does.
    """

    def fits(seconds):
        try:
            try_seconds(seconds)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    if not fits(first):
        return None
    low, high = first, first
    while high < most and fits(min(2 * high, most)):
        low = high = min(2 * high, most)
    if high < most:
        high = min(2 * high, most)
        while high > 1.05 * low:
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    return max(first, MEMORY_SHARE * low)
