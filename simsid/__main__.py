"""`python -m simsid` is the command line."""

from simsid.commands.main import main

if __name__ == "__main__":
    main()
