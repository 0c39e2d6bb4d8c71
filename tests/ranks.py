"""Start some processes of a script with the variables that torchrun sets: ranks.py COUNT SCRIPT [ARGUMENT ...].

As torchrun does, all end when one fails. But what takes seconds to import is imported once, before the processes part.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys

import sklearn.datasets  # noqa: F401
import timm.optim  # noqa: F401

import volo.annotation.generate
import volo.training.pipeline  # noqa: F401


def main(count: str, script: str, *arguments: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    running: set[int] = set()
    for rank in range(int(count)):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            sys.exit()
        running.add(pid)
    has_failed = False
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not has_failed:
            has_failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    sys.exit(has_failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
