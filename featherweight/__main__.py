"""The command ``featherweight``, also as ``python -m featherweight``."""

import os
import sys

# OpenMP's idle threads spin for milliseconds, on the cores that kernels outside OpenMP and other
# runs want. It is read when torch is loaded, so it is set before.
SPIN = {"GOMP_SPINCOUNT": "1000"}


def main() -> None:
    """Start the command line, or say what it needs where only the library is installed."""
    if not {"OMP_WAIT_POLICY", *SPIN} & set(os.environ):
        os.environ.update(SPIN)
    try:
        from featherweight.lab.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"featherweight: error: the command line needs {error.name}: "
            "pip install 'featherweight[lab]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
