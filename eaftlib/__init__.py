"""Which experts of a Mixture-of-Experts model can go, and what does it cost?"""

__version__ = "0.1.0"
