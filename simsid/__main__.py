"""`python -m simsid` is the command line."""

from simsid.cli import main

if __name__ == "__main__":
    main()
