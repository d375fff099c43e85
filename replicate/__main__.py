"""`python -m replicate`, the same as the command `replicate`."""

from replicate.cli import main

if __name__ == "__main__":
    main()
