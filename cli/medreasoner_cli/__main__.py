"""``python -m medreasoner_cli`` is ``medreasoner-cli``, as ``torchrun -m`` starts it."""

from medreasoner_cli.start import main

if __name__ == "__main__":
    main()
