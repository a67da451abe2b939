"""What holds for every verb: errors in one line, exit statuses, pipes, terminals, completion, and no torch."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.commands import (
    NOTING_TORCH,
    assert_one_line_of_error,
    run,
    run_in_terminal,
    save_steps,
)

import lastgood
from lastgood.cli import main
from lastgood.cli._output import Output, human_age, human_bytes, human_moment, human_time, printable

VERBS = ["ls", "inspect", "verify", "diff", "cat", "export", "prune", "doctor", "report", "demo"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good checkpoints, and a file that is none where a fourth should be."""
    root = tmp_path_factory.mktemp("frame") / "run"
    save_steps(root, [10, 20, 30])
    (root / "step-15").mkdir()
    (root / "step-15" / "checkpoint_0.pt").write_bytes(b"no checkpoint")
    return root


def _main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lastgood", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


# Help and version


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_command_alone_tells_its_verbs_and_statuses(words: list[str]) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("--version", "--debug", "Exit status"):
        assert word in done.stdout
    verbs = done.stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in verbs] == VERBS
    assert not any("..." in line for line in verbs)


@pytest.mark.parametrize("verb", ["ls", "prune", "doctor", "export"])
def test_each_verb_has_an_example_in_its_help(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0
    assert f"Example:\n    lastgood {verb} " in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"lastgood {lastgood.__version__}\n"


@pytest.mark.parametrize("words", [("ls",), ("ls", "--json"), ("prune", "--keep", "last=1"), ("doctor",)])
def test_these_verbs_never_import_torch(root: Path, words: tuple[str, ...]) -> None:
    done = run(*words, root, program=NOTING_TORCH)
    assert done.returncode in (0, 1)
    assert done.stderr == "torch imported: False\n"


# Errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "'nonsense'"),
        (["ls"], "ROOT"),
        (["ls", "--nonsense", "."], "--nonsense"),
        (["ls", "no/such/root"], "no/such/root"),
        (["doctor", "no/such/root"], "no/such/root"),
        (["prune", "no/such/root"], "no/such/root"),
        (["prune", ".", "--keep", "most=3"], "last=3"),
    ],
)
def test_a_wrong_call_is_told_in_one_line_with_status_2(words: list[str], said: str) -> None:
    assert_one_line_of_error(run(*words), 2, said)


def test_how_a_verb_is_called_is_one_command_away() -> None:
    assert "'lastgood ls --help'" in run("ls").stderr


@pytest.mark.parametrize(
    ("words", "environment"), [(["--debug"], {}), ([], {"LASTGOOD_DEBUG": "1"})], ids=["option", "environment"]
)
def test_a_traceback_is_there_for_those_who_ask(words: list[str], environment: dict[str, str]) -> None:
    done = run(*words, "ls", "no/such/root", environment=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CheckpointNotFoundError" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PermissionError(13, "Permission denied", "/some/file"), 1, "lastgood: /some/file: Permission denied\n"),
        (OSError(5, "Input/output error"), 1, "lastgood: Input/output error\n"),
        (lastgood.CorruptCheckpointError("it is\ndamaged"), 1, "lastgood: it is damaged\n"),
        (lastgood.StorageError("the disk is gone", errno=5), 1, "lastgood: the disk is gone\n"),
        (lastgood.ConfigError("that cannot be"), 2, "lastgood: that cannot be\n"),
        (KeyError("oops"), 1, "lastgood: a defect in lastgood: KeyError('oops'). 'lastgood --debug ...' shows where"),
        (KeyboardInterrupt(), 130, "lastgood: interrupted\n"),
    ],
)
def test_whatever_goes_wrong_in_a_verb_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    # Disks that fail, defects and ^C at the right moment cannot be had for real here.
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lastgood.cli.ls.is_one_checkpoint", fail)
    assert _main(monkeypatch, "ls", ".") == status
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.count("\n") == 1


# Where the output goes


@pytest.mark.parametrize("words", [("ls",), ("ls", "--json"), ("doctor",), ("--help",)])
def test_a_reader_that_has_enough_is_no_error(root: Path, words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*words, *([] if words == ("--help",) else [root]), capture_output=False, stdout=writing, stderr=-1)
    finally:
        os.close(writing)
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_told(root: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("ls", root, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "lastgood: No space left on device\n"


def test_colours_are_for_terminals_alone(root: Path) -> None:
    shown = run_in_terminal("ls", root)
    assert "\x1b[" in shown
    assert "15  foreign" in shown
    assert "\x1b" not in run("ls", root).stdout


def test_no_colour_where_it_is_not_wanted(tmp_path: Path) -> None:
    (tmp_path / "step-10").mkdir()
    assert "\x1b[31m" in run_in_terminal("ls", tmp_path)
    assert "\x1b[31m" not in run_in_terminal("ls", tmp_path, environment={"NO_COLOR": "1"})


def test_json_is_indented_for_those_who_read_it_and_one_line_for_scripts(root: Path) -> None:
    shown = run_in_terminal("ls", root, "--json")
    assert shown.count("\n") > 10
    assert json.loads(shown) == json.loads(run("ls", root, "--json").stdout)


def test_long_paths_are_neither_wrapped_nor_cut(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    (deep / "step-5").mkdir(parents=True)
    for shown in (run("doctor", deep).stdout, run_in_terminal("doctor", deep)):
        assert str(deep / "step-5") in shown


def test_names_cannot_command_a_terminal(root: Path, tmp_path: Path) -> None:
    evil = tmp_path / "\x1b[2Jgone"
    evil.mkdir()
    (evil / "step-5").mkdir()
    for done in (run("ls", evil), run("doctor", evil), run("ls", tmp_path / "\x1b]0;title\x07")):
        assert "\x1b" not in done.stdout + done.stderr
        assert "\\x1b" in done.stdout + done.stderr


def test_names_that_are_not_unicode_are_shown_and_encoded(tmp_path: Path) -> None:
    (tmp_path / "step-5").mkdir()
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    for encoding in ("utf-8", "ascii"):
        done = run("ls", "--all", tmp_path, environment={"PYTHONIOENCODING": encoding})
        assert "not lastgood's: \\udcff\\udcfe" in done.stdout
    assert json.loads(run("ls", tmp_path, "--json").stdout)["others"] == ["\\udcff\\udcfe"]


# Completion


def test_the_shell_completes_verbs() -> None:
    asked = {"_LASTGOOD_COMPLETE": "complete_bash", "COMP_WORDS": "lastgood d", "COMP_CWORD": "1"}
    done = run(environment=asked)
    assert {"doctor", "demo"} <= set(done.stdout.split())
    assert "ls" not in done.stdout.split()


def test_bash_takes_the_completion_that_the_command_prints() -> None:
    done = run(environment={"_LASTGOOD_COMPLETE": "source_bash"})
    assert "complete -o default -F _lastgood_completion lastgood" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True, timeout=60)
    assert "--show-completion" in run("--help").stdout


# What all verbs write with


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (10 * 1024**3, "10.0 GiB"),
        (3 * 1024**5, "3.0 PiB"),
        (5000 * 1024**6, "5000.0 EiB"),
    ],
)
def test_sizes_in_words(count: int, said: str) -> None:
    assert human_bytes(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"),
        (0.0123, "12.3 ms"),
        (0.84, "0.84 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (180, "3 min"),
        (5 * 3600, "5 h"),
        (3 * 86400, "3 days"),
        (-180, "-3 min"),
    ],
)
def test_times_in_words(seconds: float, said: str) -> None:
    assert human_time(seconds) == said


@pytest.mark.parametrize(
    ("moment", "said"), [(1000, "just now"), (820, "3 min ago"), (998, "2 s ago"), (4600, "60 min in the future")]
)
def test_ages_in_words(moment: float, said: str) -> None:
    assert human_age(moment, 1000) == said


@pytest.mark.parametrize("moment", [math.nan, math.inf, 1e300, -1e300])
def test_moments_that_no_calendar_has_are_no_error(moment: float) -> None:
    assert human_moment(moment) == "?"
    assert human_moment(1.7e9).startswith("2023-11-1")


def test_numbers_that_are_not_finite_become_null() -> None:
    file = io.StringIO()
    Output(as_json=True, file=file).json({"loss": math.nan, "best": [math.inf, 1.5]})
    assert json.loads(file.getvalue()) == {"loss": None, "best": [None, 1.5]}


def test_a_script_gets_only_json_and_a_person_only_text() -> None:
    for as_json, expected in ((True, '{"a":1}\n'), (False, "a  b\n1  2\ndone\n")):
        file = io.StringIO()
        output = Output(as_json, file=file)
        output.json({"a": 1})
        output.table(("a", "b"), [("1", "2")])
        output.print("done")
        assert file.getvalue() == expected


def test_tables_leave_out_empty_columns_and_line_up_whatever_the_letters() -> None:
    file = io.StringIO()
    rows = [("1", "", "語", "x"), ("1000", "", "ab", "line\nbreak\t")]
    Output(file=file).table(("n", "empty", "wide", "text"), rows, right=("n",))
    assert file.getvalue().splitlines() == ["   n  wide  text", "   1  語    x", "1000  ab    line break\\t"]


def test_printable_keeps_what_people_write() -> None:
    assert printable("Größe 3 µs\n層") == "Größe 3 µs\n層"
    assert printable("a\x1b[31mb\u202e") == "a\\x1b[31mb\\u202e"
