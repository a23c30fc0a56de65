"""Generated code runs with limits of time, memory and files, and without network."""

import ctypes
import socket
import sys
import time

import pytest

from mikv_vllm.evaluation.served_tasks import sandbox
from mikv_vllm.evaluation.served_tasks.sandboxed import GET_VERSION, LANDLOCK_CREATE_RULESET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")

LANDLOCK = ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, GET_VERSION)
needs_landlock = pytest.mark.skipif(LANDLOCK < 6, reason=f"the kernel has Landlock {LANDLOCK} of 6")


@pytest.mark.parametrize(
    "program", ["", "assert 1 + 1 == 2", "print('x' * 10**6)", "open('a', 'w').write('x')"]
)
def test_a_program_without_errors_passes(program):
    assert sandbox.passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "print(1); 1/0",
    ],
)
def test_a_program_that_does_not_reach_its_end_fails(program):
    assert not sandbox.passes(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(1000)"])
def test_time_is_limited(monkeypatch, program):
    monkeypatch.setattr(sandbox, "SECONDS", 2)
    begin = time.monotonic()
    assert not sandbox.passes(program)
    assert time.monotonic() - begin < 30


def test_a_process_that_a_program_leaves_behind_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 2)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    program = "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\n"
    begin = time.monotonic()
    sandbox.passes(program)
    assert time.monotonic() - begin < 30
    assert not list(tmp_path.iterdir())


def test_memory_is_limited():
    assert sandbox.passes("x = bytes(1 << 28)")
    assert not sandbox.passes("x = bytes(1 << 31)")


def test_the_size_of_files_is_limited():
    assert not sandbox.passes("open('a', 'wb').write(bytes(2 << 20))")


@needs_landlock
@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "import os; os.remove({path!r})",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.rename({path!r}, 'mine')",
    ],
)
def test_files_of_others_stay_as_they_are(tmp_path, program):
    path = tmp_path / "file"
    path.write_text("text")
    assert not sandbox.passes(program.format(path=str(path)))
    assert path.read_text() == "text"


@needs_landlock
def test_there_is_no_network():
    program = "import socket; socket.create_connection(('127.0.0.1', {})).close()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        assert not sandbox.passes(program.format(port))


@needs_landlock
def test_other_processes_get_no_signals():
    assert not sandbox.passes("import os; os.kill(os.getppid(), 0)")


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert sandbox.passes("import os; assert 'SECRET' not in os.environ")
