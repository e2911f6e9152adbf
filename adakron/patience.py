"""What must not be waited for without end: a file system may hang, and with it whoever holds a lock around it."""

import threading
from collections.abc import Callable


def at_most(seconds: float, function: Callable[[], object]) -> None:
    """Call a function, and go on after so many seconds where it has not returned: it is left behind in its thread."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
