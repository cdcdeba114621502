"""The command ``featherweight``, also as ``python -m featherweight``."""

import sys


def main() -> None:
    """Start the command line, or say what it needs where only the library is installed."""
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
