"""What every score of this package shares as an `evaluate` module: it is instantiated directly and lives in memory."""

import evaluate


class LocalMetric(evaluate.Metric):
    """A metric that ships with the package; `evaluate.load` would fetch a script from the hub, which compute nodes do not reach."""

    def __init__(self, config_name: str):
        super().__init__(config_name=config_name, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # The base class makes a folder in the home directory here; a metric that lives in memory needs none.
        return self._data_dir_root
