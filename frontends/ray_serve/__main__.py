"""python -m frontends.ray_serve --engine_dir D [--num_replicas N]: docs/scaling.md."""

from frontends.ray_serve.main import main
from nvlm.program.command_line import run

if __name__ == "__main__":
    run(main)
