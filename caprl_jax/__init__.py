"""CapRL in JAX: reinforcement learning of captions that a blind language model can answer questions
from.
"""

__version__ = "0.2.0"
