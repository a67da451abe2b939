"""How a checkpoint process comes to life: as what, with what, and what is said when it does not."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.saves import assert_state, read, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.process import in_child
from tests.process.processes import Ends, new_process, pid_of, pipe, receive, started

from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.errors import CheckpointProcessError, ConfigError
from lastgood.types import RankInfo

MOST_PRIVATE_MEMORY = 40 << 20


def private_memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def test_promise_10_the_standard_process_is_small_and_does_without_torch(tmp_path: Path) -> None:
    begun = time.monotonic()
    with started() as process:
        print(f"ready after {time.monotonic() - begun:.2f} s")
        process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
        assert process.ping()["torch_is_imported"] is False
        used = private_memory(pid_of(process))
        print(f"private memory: {used / 2**20:.1f} MiB")
        assert used < MOST_PRIVATE_MEMORY
    assert_state(read(tmp_path / "a"), 1)


def test_the_process_is_a_direct_child_in_a_session_of_its_own(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with started(init=in_child.note_start, init_arguments=(str(note),)) as process:
        parent, session, _, directory = note.read_text().split()
        assert int(parent) == os.getpid()
        assert int(session) == pid_of(process)
        assert directory == os.getcwd()
        assert os.readlink(f"/proc/{pid_of(process)}/fd/0") == "/dev/null"


def test_signals_that_end_a_job_do_not_end_it(tmp_path: Path) -> None:
    with started() as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid_of(process), number)
        process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 1)


def test_it_holds_itself_back_as_configured() -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    with started(nice=7) as process:
        assert os.getpriority(os.PRIO_PROCESS, pid_of(process)) == min(19, mine + 7)


def test_hazard_16_every_argument_reaches_the_functions(tmp_path: Path) -> None:
    config = CheckpointWriterConfig(write_barrier_timeout_secs=17, no_progress_timeout_secs=23.0)
    with pipe() as (ours, theirs):
        arguments: dict[str, Any] = {"pipe": theirs, "config": config, "option": {"deep": (1, 2)}}
        with started(in_child.noting_writer, arguments, rank_info=RankInfo(2, 4)) as process:
            assert receive(ours) == (RankInfo(2, 4), config, {"option": {"deep": (1, 2)}})
            process.write(state_of(1), str(tmp_path / "a"), step=5, note="x").result(PATIENCE_SECS)
            kwargs = {"step": 5, "note": "x"}
            for place in ("pre_commit", "post_commit"):
                assert receive(ours) == (place, str(tmp_path / "a"), kwargs)
    assert (tmp_path / "a" / "checkpoint_2.pt").exists()


def test_rank_info_is_not_forced_on_a_function_that_does_not_take_it() -> None:
    with started(in_child.PathFirst):
        pass


def test_a_failing_start_raises_with_the_childs_traceback() -> None:
    process = new_process(init=in_child.fail_to_start, init_arguments=("no such thing",))
    with pytest.raises(RuntimeError, match="could not be started") as caught:
        process.process_creation_future.result(PATIENCE_SECS)
    assert isinstance(caught.value, CheckpointProcessError)
    assert "LookupError: no such thing" in str(caught.value)
    assert "in fail_to_start" in str(caught.value)
    process.close()


def test_a_process_that_ends_while_it_starts_is_reported_with_its_last_words() -> None:
    process = new_process(init=in_child.exit_at_once, init_arguments=(5,))
    with pytest.raises(RuntimeError, match=r"Child process terminated unexpectedly.*exited with status 5") as caught:
        process.process_creation_future.result(PATIENCE_SECS)
    assert "about to exit" in str(caught.value)
    process.close()


def test_a_start_that_takes_too_long_times_out_and_leaves_no_process(tmp_path: Path) -> None:
    process = new_process(init=in_child.start_never, subprocess_init_timeout_secs=0.5)
    future = process.write(state_of(1), str(tmp_path / "a"))
    pid = pid_of(process)
    with pytest.raises(TimeoutError, match=r"Timed out after 0\.5 s"):
        process.process_creation_future.result(PATIENCE_SECS)
    with pytest.raises(TimeoutError, match=r"Timed out after 0\.5 s"):
        future.result(PATIENCE_SECS)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    process.close()


def test_what_cannot_be_passed_on_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot be passed"):
        new_process(lambda: None)


@pytest.mark.parametrize("name", ["subprocess_init_timeout_secs", "no_progress_timeout_secs", "close_timeout_secs"])
def test_a_time_out_that_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        new_process(**{name: 0})
    assert CheckpointProcessConfig(3, 4).subprocess_shutdown_timeout_secs == 4


SCRIPT = """
    import os, sys
    from pathlib import Path
    from lastgood.checkpoint_process import CheckpointProcess, CheckpointProcessConfig
    from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
    from lastgood.types import RankInfo
    from helper import nothing

    RECORD = Path(sys.argv[1])
    with RECORD.open("a") as record:
        record.write(f"{__name__}\\n")

    def init():
        assert "torch" not in sys.modules
        with RECORD.open("a") as record:
            record.write("init\\n")

    GUARD
        writer = CheckpointWriter, {"config": CheckpointWriterConfig()}
        process = CheckpointProcess(RankInfo(0, 1), CheckpointProcessConfig(), FUNCTION, (), *writer)
        process.process_creation_future.result(60)
        process.close()
"""


def run_script(tmp_path: Path, function: str, how: list[str], guard: str = 'if __name__ == "__main__":') -> list[str]:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("def nothing(): pass\n")
    (package / "script.py").write_text(textwrap.dedent(SCRIPT).replace("FUNCTION", function).replace("GUARD", guard))
    record = tmp_path / "record"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(package)])}
    subprocess.run(
        [sys.executable, *how, str(record)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return record.read_text().split()


@pytest.mark.parametrize("how", [["package/script.py"], ["-m", "package.script"]], ids=["by path", "by name"])
def test_a_function_of_the_main_module_is_found_by_importing_it(tmp_path: Path, how: list[str]) -> None:
    assert run_script(tmp_path, "init", how) == ["__main__", "__mp_main__", "init"]


def test_the_main_module_is_not_imported_for_a_function_that_lives_elsewhere(tmp_path: Path) -> None:
    assert run_script(tmp_path, "nothing", ["package/script.py"]) == ["__main__"]


def test_a_main_module_that_starts_processes_unguarded_is_told_so(tmp_path: Path) -> None:
    """Its import by the checkpoint process must not start another one, and so on."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_script(tmp_path, "init", ["package/script.py"], guard="if True:")
    assert "Put what your script does behind `if __name__ == '__main__':`" in caught.value.stderr


def test_modules_are_found_as_in_the_trainer_and_grandchildren_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that the trainer added itself, relative even, and its own PYTHONPATH for those that the process starts."""
    (tmp_path / "only_here.py").write_text("from tests.process.in_child import note_start\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, "."])
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    import only_here  # type: ignore[import-not-found]

    monkeypatch.setattr(in_child.note_start, "__module__", "only_here")
    with started(init=only_here.note_start, init_arguments=(str(tmp_path / "note"),)):
        _, _, python_path, directory = (tmp_path / "note").read_text().split()
        assert (python_path, directory) == ("/somewhere/else", str(tmp_path))


def test_a_process_without_work_leaves_with_its_trainer(tmp_path: Path) -> None:
    """A plain end of a script that has closed nothing."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from tests.process.processes import new_process, pid_of
        process = new_process()
        process.process_creation_future.result(60)
        print(pid_of(process), flush=True)
        sys.stdin.read()
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as trainer:
        assert trainer.stdout is not None
        end = Ends(int(trainer.stdout.readline()))
        trainer.communicate(timeout=PATIENCE_SECS)
    assert trainer.returncode == 0
    assert end.wait()
