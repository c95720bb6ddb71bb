"""``cpipe``: chooses the sub-command, and imports only what that one needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_cpipe import __version__

_LIGHTNING = ("fit", "validate", "test", "predict")

_HELP = f"""usage: cpipe COMMAND [OPTIONS]

Pipeline parallelism for Lightning that is never flushed.

commands:
  fit, validate, test, predict   run a LightningModule: LightningCLI with strategy 'continuous_pipe' as its default
                                 cpipe fit --config recipes/digits.yaml [--trainer.strategy.num_stages=4]
  plan                           what 'fit' would do on so many devices, without training: blocks, cuts, time, memory
                                 cpipe plan --config recipes/digits.yaml --devices 4 [--memory-limit 16GB]
  schedule                       print, draw and count a schedule
                                 cpipe schedule --schedule continuous --stages 4 --mini-batches 13

options:
  -h, --help                     this text; after a command, the command's
  --version                      {__version__}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``cpipe``.

    Raises:
        SystemExit: with status 2 if the arguments can't be understood.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(_HELP, end="")
    elif command == "--version":
        print(f"cpipe {__version__}")
    elif command == "schedule":
        from lightning_cpipe.cli.schedule import main as schedule

        schedule(words[1:])
    elif command == "plan":
        from lightning_cpipe.cli.plan import main as plan

        plan(words[1:])
    elif command in _LIGHTNING or command.startswith("-"):
        from lightning_cpipe.cli.lightning import main as lightning

        lightning(arguments)
    else:
        print(f"{_HELP}\ncpipe: there is no command {command!r}.", file=sys.stderr)
        raise SystemExit(2)
