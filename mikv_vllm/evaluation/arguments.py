"""Values of flags."""

import argparse


def positive(text: str) -> int:
    """Parse a positive integer for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
