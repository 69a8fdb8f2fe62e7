"""``python -m pot_sparsity``: the command line."""

from pot_sparsity.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
