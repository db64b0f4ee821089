"""An engine process without a model, for the tests of the client that runs it.

``python -m tests.server.engine_process ADDRESS PARENT_ID``. The model's path says how it behaves: ``hashes``
serves, ``loads`` takes its time, ``refuses`` says why it cannot serve, ``exits`` ends at once, ``talks
nonsense`` breaks the protocol.
"""

from __future__ import annotations

import os
import sys
import time

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import HashingExecutor
from server.transport import EngineEnd, Kind, Progress, Ready


def run(address: str, parent_id: int) -> int:
    assert os.getppid() == parent_id
    end = EngineEnd(address)
    try:
        _, start = end.receive()
        match start.model_path:
            case "hashes":
                executor = HashingExecutor(num_blocks=64, block_size=4, step_seconds=0.005)
                # The tests read the process id where a real engine shows its plan.
                end.send(Kind.READY, Ready(executor.spec, str(os.getpid()), 0.0))
                end.run(EngineCore(executor))
            case "loads":
                end.send(Kind.PROGRESS, Progress("weights", 1, 100))
                time.sleep(60)
            case "refuses":
                end.send(Kind.FAILED, "the model is too large")
                return 1
            case "exits":
                return 3
            case "talks nonsense":
                end.send(Kind.QUIT)
                end.receive()
    finally:
        end.close()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], int(sys.argv[2])))
