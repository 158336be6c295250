"""`mpirun -n N python -m bench.ranks`: see bench/ranks/measure.py."""

import os

from bench.ranks.measure import main
from nvlm.program import command_line
from nvlm.program.launcher import end, rank_from

if __name__ == "__main__":
    command_line.run(main, rank=rank_from(os.environ), end=end)
