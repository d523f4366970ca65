"""python -m sparsekv: the command line, where its script is not on the path."""

from sparsekv.cli.main import main

main()
