"""A training script as torchrun starts it; in its first life, rank 1 is killed in the middle of its second save."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from tests.helpers.workers import PATIENCE_SECS
from tests.survival.trainers import ELEMENTS, stop_copying

from lastgood.config import CheckpointerConfig
from lastgood.manager.checkpoint_manager import CheckpointManager


def main(root: str, notes: str) -> None:
    dist.init_process_group("gloo")
    rank, life = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    config = CheckpointerConfig()
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS  # it imports torch, on a busy machine
    # Should a rank vanish unheard, the others wait for it, and the next attempt for them, no longer than this.
    config.writer_config.write_barrier_timeout_secs = int(PATIENCE_SECS)
    config.process_config.nice = 0  # nor does it wait for whatever else the machine does
    with CheckpointManager(root, config=config, preemption_signals=()) as manager:
        state = {"weights": torch.full((ELEMENTS,), float(rank)), "step": 0}
        resumed = manager.restore(state)
        Path(notes, f"life-{life}-rank-{rank}").write_text(f"{resumed} {state['step']} {state['weights'][-1].item()}")
        for step in (1, 2, 3):
            if step <= (resumed or 0):
                continue
            state["step"] = step
            state["weights"] += 10
            if (life, rank, step) == ("0", 1, 2):
                stop_copying(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
            saved = manager.save(step, state)
            if life == "0" and step == 2:
                threading.Event().wait()
            saved.result(PATIENCE_SECS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
