"""Prints which backends work on this machine and, for the others, why not."""

import platform

import torch

from prefixattn import __version__, backends


def main() -> None:
    print(f"prefixattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    width = max(map(len, backends.NAMES))
    for name, reasons in backends.here().items():
        print(f"  {name:{width}}  " + ("no: " + "; ".join(reasons) if reasons else "works"))


if __name__ == "__main__":
    main()
