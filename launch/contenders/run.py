"""One rank of one contender: `python -m launch.contenders.run NAME WORKLOAD STARTED`, WORKLOAD as JSON, STARTED by `time.monotonic`.

A line on standard input lets it do a round; a line of JSON on standard output says how long that took.
"""

import dataclasses
import json
import os
import sys

from adakron import launcher
from launch.contenders import CONTENDERS
from launch.contenders.pace import Pace, own_stdout
from launch.contenders.workload import Workload
from launch.program import quiet_libraries


def main(name: str, workload: Workload, started: float) -> None:
    """Train, and score where that is asked for, as the contender of that name does."""
    said = own_stdout()
    quiet_libraries()
    launcher.join(launcher.read_world(os.environ), os.environ)

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit("launch/bench.py is gone")

    pace = Pace(workload, wait, lambda round_: print(json.dumps(dataclasses.asdict(round_)), file=said), started)
    CONTENDERS[name].load()(workload, pace)


if __name__ == "__main__":
    main(sys.argv[1], Workload(**json.loads(sys.argv[2])), float(sys.argv[3]))
