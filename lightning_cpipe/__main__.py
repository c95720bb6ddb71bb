"""``python -m lightning_cpipe`` is ``cpipe``."""

from lightning_cpipe.cli.main import main

if __name__ == "__main__":
    main()
