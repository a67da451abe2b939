"""Processes in which nobody measures which lines are run, under `make coverage` too."""

import os


def unmeasured_environment(**variables: str) -> dict[str, str]:
    """This process's environment and these variables, without those that tell coverage to start in child processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return {**inherited, **variables}
