"""Reading what is pretrained from a folder or the hub: where from, without noise, and with one sentence where it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from adakron.config import ModelConfig
from adakron.errors import ConfigError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no table of new head weights: `load_backbone` checks what that table only shows."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def hub_arguments(config: ModelConfig, path: str) -> dict[str, Any]:
    """Keyword arguments of transformers' `from_pretrained` for that folder or hub id."""
    if Path(path).is_dir():
        # What a folder lacks (a generation config, a chat template) is not looked for on the hub.
        return {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
    return {"revision": config.model_revision, "cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}


def reason_of(error: Exception) -> str:
    """One line that says what a library's error is about."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A line that ends at a colon announces the reason, which is on the next.
    end = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])


@contextmanager
def reading(what: str, path: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises inside into one ConfigError: what could not be read, from where, why, and which flag to set (remedy)."""
    # Libraries raise a dozen unrelated classes for an unreadable or unknown model; a user needs one sentence for all.
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        place = "the folder" if Path(path).is_dir() else "neither a local folder nor a hub id that could be fetched:"
        raise ConfigError(f"cannot read the {what} of the model, {place} {path}: {reason_of(error)} (set {remedy})") from error
