"""What notebooks and other programs use: `from caprl_jax import Captioner, Judge, train`."""
