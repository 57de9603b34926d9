"""`python -m tests.training.interrupted SIGNAL STEP ...`: jaxlm, sending itself a signal as it writes that step's metrics."""

import os
import signal
import sys

from jaxlm import cli
from jaxlm.training import loop


def main() -> int:
    number, at, *arguments = sys.argv[1:]
    write = loop.MetricsWriter.write

    def write_then_signal(self, step, **values):
        write(self, step, **values)
        if step == int(at) and "loss" in values:
            os.kill(os.getpid(), signal.Signals[number])

    loop.MetricsWriter.write = write_then_signal
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
