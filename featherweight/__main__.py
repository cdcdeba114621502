"""``python -m featherweight`` is the command ``featherweight``."""

from featherweight.lab.cli import main

main()
