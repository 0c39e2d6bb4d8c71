"""Memory of a device: how much is left, and what it looks like when there is none."""

from __future__ import annotations

import torch

from volo.data.sources import free_memory, local_processes

OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "could not create a primitive")
"""What allocators say; the last is oneDNN's."""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process may still take on its device, on a CPU its share; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free_here = free_memory() if device.type == "cpu" else None
    return free_here and free_here // local_processes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had. On a CPU torch has no class of its own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in OUT_OF_MEMORY)
