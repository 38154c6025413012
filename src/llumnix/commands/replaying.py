"""`llumnix replay`: runs an event log again."""

import argparse
from dataclasses import asdict
from pathlib import Path

from llumnix.commands.printing import count, print_json


def replay(argv: list[str]) -> int:
    """0 if the log's decisions and steps come out the same again, else 1."""
    from llumnix.observe.replay import DIFFERENCES_MAX
    from llumnix.observe.replay import replay as run_again

    parser = argparse.ArgumentParser(prog="llumnix replay")
    parser.add_argument("log", metavar="LOG", type=Path, help="what --event-log wrote")
    parser.add_argument("--json", action="store_true", help="counts and differences as JSON")
    args = parser.parse_args(argv)
    result = run_again(args.log)
    found = result.differences
    if args.json:
        print_json(asdict(result))
        return 1 if found else 0
    print(
        f"{count(result.facts, 'fact')}, {count(result.decisions, 'decision')} and "
        f"{count(result.steps, 'migration step')} run again: "
        + (count(len(found), "difference") if found else "no difference")
        + (" or more" if len(found) >= DIFFERENCES_MAX else "")
    )
    if result.dropped:
        print(f"{count(result.dropped, 'line')} missing: what follows them is not replayed")
    if result.failed:
        print(
            f"{count(result.failed, 'fact')} could not be handled, which is a bug: what follows is "
            "not replayed"
        )
    if result.skipped:
        print(f"{count(result.skipped, 'fact')} left out: no start of a scheduler goes before them")
    for difference in found:
        print(difference)
    return 1 if found else 0
