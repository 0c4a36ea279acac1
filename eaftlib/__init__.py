"""Which experts of a Mixture-of-Experts model can go, and what does it cost?"""

import os

__version__ = "0.1.0"

# OpenMP threads that wait by spinning starve each other when cores are shared: with a second busy process on two cores,
# scoring ran 18 times faster once they sleep instead (bench/results). Read when torch loads, so set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
