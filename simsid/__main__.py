"""`python -m simsid` is the command line."""

from simsid.cli import main

main()
