"""Which records a process answers: data parallelism as Megatron-LM cuts it."""

from __future__ import annotations

from nvlm.program.errors import UserError


def partition_bounds(
    num_records: int, num_partitions: int, partition_id: int, num_samples_per_partition: int = 0
) -> tuple[int, int]:
    """The first record and the one after the last. 0 partitions: everything, as one.

    Without `num_samples_per_partition` the records are shared out evenly
    (examples/multimodal/evaluation/evaluation_datasets.py, _get_partition_bounds).
    """
    if num_partitions == 0 and num_samples_per_partition:
        raise UserError(
            "--num_samples_per_partition goes with --num_partitions; give --num_partitions 1 for "
            "the first samples only"
        )
    if num_partitions == 0 and partition_id:
        raise UserError(
            f"--partition_id {partition_id} goes with --num_partitions; give the number of shares"
        )
    if not 0 <= partition_id < max(num_partitions, 1):
        raise UserError(
            f"--partition_id is {partition_id}, expected 0 to {max(num_partitions, 1) - 1} "
            f"(--num_partitions {num_partitions})"
        )
    if num_samples_per_partition:
        first = num_samples_per_partition * partition_id
        if first >= num_records:
            raise UserError(
                f"--partition_id {partition_id} starts at sample {first} and the data set has "
                f"{num_records}; give a smaller --partition_id or --num_samples_per_partition"
            )
        return first, min(first + num_samples_per_partition, num_records)
    if num_partitions == 0:
        return 0, num_records
    first, end = (_edge(num_records, num_partitions, k) for k in (partition_id, partition_id + 1))
    return first, end


def _edge(num_records: int, num_partitions: int, k: int) -> int:
    """`int(np.linspace(0, num_records, num_partitions + 1)[k])`, without the others."""
    return num_records if k == num_partitions else int(k * (num_records / num_partitions))
