#!/bin/bash
# A benchmark over the GPUs of many machines: each task answers a share, then the first scores all.
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-task 1 examples/slurm_shares.sh \
#       --engine_dir /fast/engine --task ChartQA --input_image_path /data/chartqa/png \
#       --gt_path /data/chartqa/test_human.json /data/chartqa/test_augmented.json \
#       --output_path /results/fp8
#
# The flags are those of `evaluate.py generate`. Every machine needs this checkout, the engine, the
# data and --output_path at the same paths. Submitted again with as many tasks, it resumes with what
# is missing. PYTHON: the environment's, .venv/bin/python by default.
#SBATCH --job-name=nvlm-shares
#SBATCH --requeue
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

# Without MPI: tasks are processes of their own, not ranks of one model. One that fails stops no other.
srun --mpi=none --kill-on-bad-exit=0 "$BASH" -c '
    exec "${PYTHON:-.venv/bin/python}" evaluate.py generate "$@" \
        --num_partitions "$SLURM_NTASKS" --partition_id "$SLURM_PROCID"
' share "$@"
status=$?

while [ $# -gt 0 ] && [ "$1" != --output_path ]; do shift; done
"${PYTHON:-.venv/bin/python}" evaluate.py score --input_path "${2:?give --output_path}" || exit $?
exit $status
