"""``python -m inlay`` is ``inlay``, and what ``torchrun -m`` and ``accelerate launch -m`` start."""

from inlay.cli import main

if __name__ == "__main__":
    main()
