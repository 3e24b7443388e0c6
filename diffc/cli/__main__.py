"""`python -m diffc.cli`."""

from diffc.cli.main import main

if __name__ == "__main__":
    main()
