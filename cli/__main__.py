"""`python -m steerrec.cli`."""

from steerrec.cli import main

main()
