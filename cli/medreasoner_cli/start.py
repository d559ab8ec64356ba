"""Where `medreasoner-cli` starts: Ctrl-C ends it without a traceback from the first moment on."""

import signal

__all__ = ["main"]


def main() -> None:
    """Import the program and run it; while it is imported, the signal ends the process by itself."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where a shell runs the program in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from medreasoner_cli.main import main as program

    signal.signal(signal.SIGINT, handler)
    program()
