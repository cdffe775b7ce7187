"""What `jax-lora bench` times: the kernels, and with `bench step` the whole step of a model."""

from jax_lora.bench.kernels import CASES as CASES
from jax_lora.bench.kernels import LARGE as LARGE
from jax_lora.bench.kernels import PEERS as PEERS
from jax_lora.bench.kernels import Case as Case
from jax_lora.bench.kernels import Report as Report
from jax_lora.bench.kernels import Result as Result
from jax_lora.bench.kernels import check_plot as check_plot
from jax_lora.bench.kernels import plot as plot
from jax_lora.bench.kernels import read_cases as read_cases
from jax_lora.bench.kernels import run as run
from jax_lora.bench.timing import COPY_RATE as COPY_RATE
