"""python -m neuronlens: the command line."""

from neuronlens.cli import main

if __name__ == "__main__":
    main()
