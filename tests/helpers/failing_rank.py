"""launch/train.py, in which rank 1 fails at its fourth step as no input can make it fail.

torchrun --nproc-per-node 2 --module tests.helpers.failing_rank FLAGS
"""

import os

from adakron.passes import StepPasses
from launch import train
from launch.program import execute

if __name__ == "__main__":
    train.LISTENER.listen()
    if os.environ["RANK"] == "1":
        gradient = StepPasses.gradient

        def failing(passes, batch):
            if passes._engine.global_step == 3:
                raise KeyError("no such column; api_key=s3cret")
            return gradient(passes, batch)

        StepPasses.gradient = failing  # type: ignore[method-assign]
    execute(train.main)
