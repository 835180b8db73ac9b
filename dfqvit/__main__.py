"""`python -m dfqvit` is the same program as `dfqvit`."""

from .cli import main

if __name__ == "__main__":
    main()
