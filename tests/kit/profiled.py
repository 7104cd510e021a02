"""What torch's profiler counted on a CPU."""

from torch.profiler import profile


def allocated_peak(profiler: profile) -> int:
    """The highest "Total Allocated" above what was allocated at the beginning, in bytes."""
    from torch._C._profiler import _EventType

    found, todo = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            extra = event.extra_fields
            found.append((event.start_time_ns, extra.total_allocated, extra.alloc_size))
    _, total, size = min(found)
    return int(max(total for _, total, _ in found) - (total - size))
