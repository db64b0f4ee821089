"""How many files and connections this process may have open."""

from __future__ import annotations

import logging
import resource

_log = logging.getLogger(__name__)

# A connection is a file. Fewer than this are soon too few.
_FEW = 10_240


def raise_open_files() -> int:
    """Raises the soft limit to the hard one, which needs no rights; says so if that is still little.

    Returns how many files this process may have open. Processes that it starts inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as error:  # a hard limit that the kernel's own bound does not allow
            _log.warning("the limit of open files stays at %d: %s", soft, error)
    if 0 <= soft < _FEW:  # RLIM_INFINITY is -1
        _log.warning(
            "this process may have %d files open, so about as many connections; more are not accepted until "
            "some close. Raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit of Docker)",
            soft,
        )
    return soft
