"""`python -m simsid` is the command line."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C during its imports ends it like one during a command."""
    try:
        from simsid.commands.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
