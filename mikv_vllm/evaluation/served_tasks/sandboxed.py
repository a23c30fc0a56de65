"""Limits this process, then runs the program that stands in its standard input.

Linux only. The first line of the input is printed after the program has run to its end. The limits
do not protect against a program that attacks the kernel. Run mikv-eval in a container if you do not
trust the code.
"""

import ctypes
import os
import resource
import struct
import sys

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 32

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
WRITE = 0x1FF2
"""Landlock's rights to write, remove and make files."""
TRUNCATE = 1 << 14
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
SCOPE_SIGNAL = 1 << 1
"""Landlock's restriction of signals to processes with the same restrictions."""
GET_VERSION = 1
RULE_PATH_BENEATH = 1


def limit() -> None:
    """Set all limits: time, memory, files, processes, network."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    # A new network namespace has no interface that is up. Some kernels and containers forbid it.
    libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restrict(libc)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def restrict(libc: ctypes.CDLL) -> None:
    """Restrict this process with the parts of Landlock that the kernel supports.

    With all of them it can write files below its working directory only, use no TCP, and send no
    signals to others.
    """
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, GET_VERSION)
    if version < 1:
        return
    rights = WRITE | (TRUNCATE if version >= 3 else 0)
    attributes = [rights]
    if version >= 4:
        attributes.append(BIND_TCP | CONNECT_TCP)
    if version >= 6:
        attributes.append(SCOPE_SIGNAL)
    ruleset = struct.pack(f"{len(attributes)}Q", *attributes)
    handle = libc.syscall(LANDLOCK_CREATE_RULESET, ruleset, len(ruleset), 0)
    folder = os.open(".", os.O_PATH)
    rule = struct.pack("=Qi", rights, folder)
    libc.syscall(LANDLOCK_ADD_RULE, handle, RULE_PATH_BENEATH, rule, 0)
    libc.syscall(LANDLOCK_RESTRICT_SELF, handle, 0)
    os.close(folder)
    os.close(handle)


if __name__ == "__main__":
    marker, _, program = sys.stdin.read().partition("\n")
    result = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit()
    exec(compile(program, "answer", "exec"), {"__name__": "answer"})
    os.write(result, marker.encode())
