"""The only room that imports deepspeed: its JSON, and the engine around `deepspeed.initialize`."""

import logging

# Deepspeed says on standard output, while it is imported, that it found no GPU: a run's opening line names the device, and
# a program's output is its own.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
