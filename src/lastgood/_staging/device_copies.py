"""Copies from an accelerator's memory into an arena, beside the computation.

Not yet run on a device. The order is: an event on the compute stream at the call for the snapshot; a side stream waits
for it; the copies are queued there without blocking; the host waits for an event behind the last one. So the copies see
what was computed before the call, and nobody is told that staging is over before the last byte has arrived. What is
computed after the call may run at the same time: optimizers' steps are held back until the copies are over.
"""

from typing import Any, Protocol

import torch

from lastgood._events import logger
from lastgood._staging.arena import Arena


class Runtime(Protocol):
    """What is used of a device's module, such as ``torch.cuda``."""

    def Stream(self, device: torch.device) -> Any: ...

    def Event(self) -> Any: ...

    def current_stream(self, device: torch.device) -> Any: ...

    def stream(self, stream: Any) -> Any: ...


def runtime_of(device: torch.device) -> Any:
    """The module of a device's type."""
    return torch.get_device_module(device)


class DeviceCopies:
    """The copies of one snapshot from one device; make it in the thread that asks for the snapshot."""

    def __init__(self, runtime: Runtime, device: torch.device, *, non_blocking: bool) -> None:
        self._runtime = runtime
        self._non_blocking = non_blocking
        self._called = runtime.Event()
        self._called.record(runtime.current_stream(device))
        self._side = runtime.Stream(device)

    def copy(self, sources: list[torch.Tensor], targets: list[memoryview]) -> None:
        """Copy bytes into host memory, many small ones in one call; returns when they have arrived."""
        self._side.wait_event(self._called)
        with self._runtime.stream(self._side):
            torch._foreach_copy_(
                [torch.frombuffer(target, dtype=torch.uint8) for target in targets],
                sources,
                non_blocking=self._non_blocking,
            )
            for source in sources:
                # The allocator must not hand this memory to somebody else before the side stream is done with it.
                source.record_stream(self._side)
            arrived = self._runtime.Event()
            arrived.record(self._side)
        arrived.synchronize()


class PinnedArena:
    """Registers a whole arena with CUDA, once for each mapping: copies into it then need no bounce buffer."""

    def __init__(self, runtime: Any) -> None:
        self._cudart = runtime.cudart()
        self._registered = 0

    def register(self, arena: Arena) -> None:
        """Call it after the arena was reserved; does nothing if this mapping is registered."""
        if self._registered == arena.address:
            return
        self.unregister()
        result = int(self._cudart.cudaHostRegister(arena.address, arena.size, 0))
        if result == 0:
            self._registered = arena.address
        else:
            logger.warning("the arena cannot be pinned (CUDA error %d): copies from the device will be slower", result)

    def unregister(self) -> None:
        """Call it before the arena is unmapped."""
        address, self._registered = self._registered, 0
        if address:
            self._cudart.cudaHostUnregister(address)
