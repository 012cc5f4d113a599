"""The console script, and `python -m personasteer`: Ctrl-C while the command line is loaded is one line, too."""

import sys


def main() -> None:
    """Run the command line; exits the process."""
    try:
        from personasteer.cli import main as run

        run()
    except KeyboardInterrupt:
        print("personasteer: interrupted", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
