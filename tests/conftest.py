"""Settings that every test shares."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
os.environ["MPLBACKEND"] = "Agg"  # plots are written to files: no test needs a screen

# The wall time of an example says nothing on a busy machine; CI sees the same examples every run.
settings.register_profile("steerrec", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("steerrec")
