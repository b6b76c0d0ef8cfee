"""How the tests are compiled: with little effort, since most programs run once, and compiling is half of the time.

What is compared does not depend on it. The README's commands are compiled as a user's programs are.
"""

import gc

import jax
import jaxlib.version
from jax._src.interpreters import partial_eval

# A program in one part: LLVM takes parts side by side, which gains nothing where all cores have work.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
OLD = jaxlib.version.__version_info__ < (0, 11)
if OLD:  # a flag that a version lacks ends the process
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]


def quick():
    """Fewer collections of garbage, of which tracing makes little, and no call stacks in the programs' text.

    Flax asks a tracer for its sharding at every random key that it makes. It has none, and JAX before 0.11 reads the
    whole program for the words of an error that nobody sees: most of the time that a large network's shapes take.
    """
    gc.set_threshold(200_000, 50, 100)
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if OLD:
        partial_eval.DynamicJaxprTracer._origin_msg = lambda self: ""
