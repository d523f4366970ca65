"""python -m sparsekv.retrofit CONFIG.yaml [key=value ...]: the `sparsekv retrofit` command without its extras."""

import sys

from sparsekv.retrofit.config import load_config
from sparsekv.retrofit.run import run


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    if not arguments:
        print("usage: python -m sparsekv.retrofit CONFIG.yaml [key=value ...]", file=sys.stderr)
        return 2
    try:
        run(load_config(arguments[0], overrides=arguments[1:]))
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
