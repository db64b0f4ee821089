from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("parent_id", "lives"),
    [
        (1, True),  # in a container the API process is often process 1
        (4242, False),  # the parent has died: another process has adopted us
    ],
)
def test_the_engine_does_not_outlive_the_process_that_started_it(parent_id: int, lives: bool) -> None:
    script = (
        "import os; os.getppid = lambda: 1; from server.launch import follow_parent; "
        f"follow_parent({parent_id}); print('lives')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip() == "lives") is lives
    assert done.returncode == (0 if lives else 1)
