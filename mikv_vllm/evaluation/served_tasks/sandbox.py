"""Runs generated code in a process of its own, with limits."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SECONDS = 20
"""Longest time of a run."""


def passes(program: str) -> bool:
    """Return whether a program runs to its end without an error.

    ``sandboxed.py`` sets the limits. A program that ends early, also with status 0, does not pass.
    """
    marker = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="mikv-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("sandboxed.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(f"{marker}\n{program}", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # The program may have started other processes, which are in the same group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode == 0 and output.endswith(marker)
