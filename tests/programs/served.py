"""serve.py as tests need it: in float64, where neighbours change nothing, and with steps that can be held up or broken.

    python served.py GATE OPTIONS...

While the file GATE is there, the engine waits in front of its next step; if it holds a number, that many steps are let
through. SIGUSR1 ends the engine's thread; SIGUSR2 lets its next step take for ever.
"""

import signal
import sys
import time
from pathlib import Path

from nanogptx import program, sample, serve

gate, orders, real = Path(sys.argv[1]), [], serve.Engine.step


def let_through() -> bool:
    try:
        if steps := int(gate.read_text() or 0):
            gate.write_text(str(steps - 1))
        return bool(steps)
    except FileNotFoundError:
        return True


def step(self):
    while self.held and not any(job.cancelled for job in self.everybody()) and not let_through():
        self.last_step_at = time.monotonic()
        time.sleep(0.002)
    if orders:
        time.sleep(orders[0]) if orders[0] else sys.exit()
    return real(self)


serve.Engine.step = step
sample.prepare = lambda model, dtype: model.double().eval()
signal.signal(signal.SIGUSR1, lambda *_: orders.append(0))
signal.signal(signal.SIGUSR2, lambda *_: orders.append(10_000))
program.run(lambda: serve.main(sys.argv[2:]))
