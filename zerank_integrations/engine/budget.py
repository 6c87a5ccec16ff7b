"""How many tokens a step holds when nobody says."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from zerank_integrations.prompt import Prompt

if TYPE_CHECKING:
    from zerank_integrations.engine.forward import Forward

# CPU seconds at 2,048, 4,096 and 8,192 tokens, in bfloat16 on 4 layers of Qwen3-1.7B's shape: 75 kB with a query of 50 tokens
# 19.0, 18.9, 20.8; 12 kB with 300 tokens 4.5, 4.1, 4.2.
CPU_BUDGET = 4_096

# Of a GPU's free memory, what a step may take: others allocate too, and the allocator's blocks do not fit snugly.
SHARE = 0.7
LEAST, MOST = 2_048, 65_536
WARM_UP = (512, 4_096)


def default_budget(forward: Forward, device: torch.device) -> int:
    """Tokens of a step: a fixed number on a CPU, as many as fit into the free memory of a GPU."""
    if device.type != "cuda":
        return CPU_BUDGET
    # Not measured yet: written for a GPU, run on none.
    try:
        peaks = [_peak(forward, tokens, device) for tokens in WARM_UP]
    except torch.OutOfMemoryError:
        return LEAST
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return fitting(free, WARM_UP, peaks)


def fitting(free: int, tokens: tuple[int, int], peaks: list[int]) -> int:
    """The tokens that fit into `free` bytes, from the peaks in bytes of two steps of different size."""
    each = max(1.0, (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]))
    fixed = max(0.0, peaks[0] - each * tokens[0])
    return int(min(MOST, max(LEAST, (SHARE * free - fixed) / each)))


def _peak(forward: Forward, tokens: int, device: torch.device) -> int:
    """Bytes a step of so many tokens takes beside the weights."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    piece = array("i", range(64))
    forward([Prompt(piece, array("i", range(i, i + 64)), piece, truncated=False) for i in range(tokens // 128)])
    return torch.cuda.max_memory_allocated(device) - before
