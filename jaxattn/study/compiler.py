"""What the study asks of XLA's compiler on the CPU: little effort, for there are many programs, and all are small.

Measured with jax 0.10.2 on one core of an AMD EPYC, the study's network of global attention on digits: to compile a
step and to take it takes 3.2 s and 9.0 ms at level 3 with fusion emitters, 3.0 s and 8.0 ms at level 1 with them, 3.5 s
and 11.9 ms without. But to initialise the network, by programs that run once, takes 6.5 s with them and 2.3 s without.
"""

import jaxlib.version

OLD = jaxlib.version.__version_info__ < (0, 11)  # has the choice of emitters; a flag that a version lacks is an error

# One thread a process: processes share the cores, and the order of a sum, so its last bits, is the same for any number.
ENVIRONMENT = {"NPROC": "1"}
FLAGS = ["--xla_backend_optimization_level=1", "--xla_cpu_multi_thread_eigen=false"]
FLAGS += ["--xla_cpu_use_fusion_emitters=false"] if OLD else []

# The `compiler_options` of what runs many times.
LOOP = {"xla_cpu_use_fusion_emitters": True} if OLD else {}
