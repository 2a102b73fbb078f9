"""`python -m fedmini` is the command line."""

from fedmini.cli import main

if __name__ == "__main__":
    main()
