"""``python -m tests.crash.power_cuts.replay 'CASE'``, with the case that a failed test has printed."""

import sys

from tests.crash.power_cuts.cutting import Case, Cutter, Scenario
from tests.crash.power_cuts.random_runs import numbered_scenario
from tests.crash.power_cuts.scenarios import LARGER, SMALL
from tests.crash.power_cuts.several_ranks import SEVERAL


def parse(text: str) -> Case:
    """The case that is written like this."""
    name, moment, choice = text.rsplit("/", 2)
    return Case(name, int(moment), choice)


def scenario_named(name: str) -> Scenario:
    found = numbered_scenario(name) or {scenario.name: scenario for scenario in [*SMALL, *LARGER, *SEVERAL]}.get(name)
    if found is None:
        raise SystemExit(f"there is no scenario {name!r}")
    return found


def replay(case: Case, scenario: Scenario | None = None) -> None:
    """Record the scenario once more, and recover from the same state; raises what that raises."""
    Cutter(scenario_named(case.scenario) if scenario is None else scenario).replay(case)


def main(arguments: list[str]) -> None:
    [case] = arguments
    replay(parse(case))
    print("all promises are kept")


if __name__ == "__main__":
    main(sys.argv[1:])
