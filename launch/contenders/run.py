"""One contender in a process of its own: `python -m launch.contenders.run NAME WORKLOAD`, WORKLOAD as JSON.

A line on standard input lets it do a round; a line of JSON on standard output says how long that took.
"""

import dataclasses
import json
import sys

from launch.contenders import CONTENDERS
from launch.contenders.pace import Pace, own_stdout
from launch.contenders.workload import Workload


def main(name: str, workload: Workload) -> None:
    """Train as the contender of that name does."""
    said = own_stdout()

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit("launch/bench.py is gone")

    pace = Pace(workload.steps_per_round, wait, lambda round_: print(json.dumps(dataclasses.asdict(round_)), file=said))
    CONTENDERS[name].load()(workload, pace)


if __name__ == "__main__":
    main(sys.argv[1], Workload(**json.loads(sys.argv[2])))
