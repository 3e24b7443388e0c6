"""`python -m diffc`: the command line."""

from diffc.cli.main import main

if __name__ == "__main__":
    main()
