"""Check of the server's address before the model is loaded."""

import errno
from argparse import Namespace

from mikv_vllm.server.refusals import Refusal


def check_address(args: Namespace) -> None:
    """Bind the server's address once, and release it.

    vLLM binds it later and ends with a stack trace if that fails.

    Args:
        args: the parsed command line of ``vllm serve``.

    Raises:
        Refusal: the address is in use, is not one of this machine, or is not permitted.
    """
    from vllm.entrypoints.launchers.launcher import create_server_socket

    if args.headless or args.uds:
        return
    host = args.host or "0.0.0.0"
    try:
        create_server_socket((args.host or "", args.port), reuse_port=False).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = (
                f"another process listens on {host}:{args.port}; stop it, or set another --port"
            )
        elif error.errno == errno.EACCES:
            reason = f"this user may not listen on {host}:{args.port}; set a port from 1024 on"
        else:
            reason = f"{host} is not an address of this machine ({error}); set another --host"
        raise Refusal(f"--host {host} --port {args.port}: {reason}.") from None
    except OverflowError:
        raise Refusal(
            f"--port {args.port} is not allowed; give a number from 0 to 65535."
        ) from None
