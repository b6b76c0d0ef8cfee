"""`python -m jaxattn`, the command `jaxattn`."""

from jaxattn.cli import main

if __name__ == "__main__":
    main()
