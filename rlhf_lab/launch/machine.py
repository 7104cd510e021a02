"""Prepare a process for training: memory allocator, threads, quiet libraries."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def prepare_process() -> None:
    """Call once, when training starts. Safe to call again, and on any system.

    glibc gives every large block back to the kernel when it is freed, and the kernel clears it
    page by page when it is wanted again. Training frees and wants the same blocks thousands of
    times, so we let the process keep up to half a gigabyte of them.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none, and does not need it
            libc.mallopt(M_MMAP_THRESHOLD, 256 << 20)
            libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)
            libc.mallopt(M_TOP_PAD, 32 << 20)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers renamed gradient_checkpointing; TRL still passes the old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
    _quiet_bars()


def _quiet_bars() -> None:
    """One progress bar is ours: those of datasets and transformers are switched off."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
