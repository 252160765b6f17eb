"""How threads of torch wait for one another. Without torch: OpenMP reads this once, when torch is imported."""

from __future__ import annotations

import os
import sys


def wait_briefly() -> None:
    """Lets threads that wait spin for some microseconds, then sleep; to be called before torch is imported.

    By default they spin for milliseconds. With all cores busy, one forward pass took 2.4 s instead of 0.45 s, for the
    thread that they wait for has no core. Sleeping at once (`OMP_WAIT_POLICY=PASSIVE`) takes 1.7 times as long on an
    idle machine, a short spin 1.1 times. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    if sys.platform == "linux":  # where torch comes with GNU's OpenMP
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
