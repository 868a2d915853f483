from caprl_jax.api.captioner import Caption as Caption
from caprl_jax.api.captioner import Captioner as Captioner
from caprl_jax.api.judge import Answer as Answer
from caprl_jax.api.judge import Judge as Judge
from caprl_jax.api.results import Results as Results
from caprl_jax.api.training import TrainingResult as TrainingResult
from caprl_jax.api.training import evaluate as evaluate
from caprl_jax.api.training import load_config as load_config
from caprl_jax.api.training import train as train
from caprl_jax.data.rows import Question as Question

__version__: str
