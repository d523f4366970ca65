"""`sparsekv bench`: speed, both sides measured in the same process and printed side by side.

decode and prefill time whole forwards against plain Transformers (bench/plain.py), or with --shape the attention
kernels alone, at random (bench/kernels.py). step, serve and suite time an engine with random weights, on a GPU. train
times attention with the gate beside FlexAttention, and the whole step of a retrofit (bench/train.py). host times what
the engine does in a step beside the device, on any machine (bench/host.py).
"""

import typer

from sparsekv.cli.bench.engine import host, step, suite
from sparsekv.cli.bench.forwards import decode, prefill
from sparsekv.cli.bench.serve import serve
from sparsekv.cli.bench.train import train
from sparsekv.cli.config import with_config

app = typer.Typer(
    help="Speed, side by side with plain Transformers.", no_args_is_help=True, pretty_exceptions_enable=False
)
for _command in (decode, prefill, step, serve, train, host, suite):
    app.command(_command.__name__)(with_config(_command))
