"""The training script of rank 1 of three, whose checkpoint process is killed in the middle of the last save."""

import signal
import sys

import torch
from tests.helpers.workers import PATIENCE_SECS
from tests.survival.traces import ProcessEnd
from tests.survival.trainers import process_of

from lastgood._coordination.calls import Coordination
from lastgood.builder import make_async_checkpointer
from lastgood.config import CheckpointerConfig
from lastgood.types import RankInfo

JOB, SERIES = "job", "series"


def main(path: str, port: str, ending: str) -> None:
    coordination = Coordination(1, 3, "127.0.0.1", int(port), JOB, SERIES)
    config = CheckpointerConfig()
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS
    checkpointer = make_async_checkpointer(config, RankInfo(1, 3), coordination=coordination)
    process = process_of(checkpointer)
    # Nobody else saves: it waits for rank 0.
    staged, written = checkpointer.save(path, {"weights": torch.zeros(9)})
    staged.result(PATIENCE_SECS)
    with ProcessEnd(process) as end:
        end.send_signal(signal.SIGKILL)
    if ending == "by the error":
        written.result(PATIENCE_SECS)
    written.exception(PATIENCE_SECS)
    if ending == "after it has closed":
        checkpointer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
