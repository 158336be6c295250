"""A task's samples through the engine's loop: an answer is written the moment it is there."""

from __future__ import annotations

from dataclasses import replace

from tqdm import tqdm

from evaluation.asking.answer_lines import FINISH_REASON
from evaluation.asking.results_file import ResultsFile
from evaluation.datasets.sample import Sample
from evaluation.tasks import Task, answer_line
from nvlm.inputs.images import AS_REFERENCE
from nvlm.inputs.prompt import prompt_text
from nvlm.program.errors import UserError
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner


def generate(
    runner: Runner,
    task: Task,
    samples: list[Sample],
    defaults: GenerationRequest,
    file: ResultsFile,
) -> list[str]:
    """Answers what is missing from `file`; returns what failed, a sentence for each sample."""
    todo = [sample for sample in samples if sample.id not in file.finished]
    failures = []
    requests = [sample_request(task, sample, defaults) for sample in todo]
    with tqdm(
        total=len(samples), initial=len(samples) - len(todo), desc=task.name, unit=" samples"
    ) as progress:
        for index, result in runner.generate_batch(requests):
            sample = todo[index]
            if isinstance(result, UserError):
                failures.append(f"{task.name} sample {sample.id}: {result}")
            else:
                prompt = task_prompt(sample, defaults)
                line = answer_line(task, sample, prompt, result.text)
                file.append({**line, FINISH_REASON: result.finish_reason})
            progress.update()
    return failures


def task_prompt(sample: Sample, defaults: GenerationRequest) -> str:
    """As the answer lines have it."""
    return prompt_text(sample.content, defaults.system, defaults.prompt_format)


def sample_request(task: Task, sample: Sample, defaults: GenerationRequest) -> GenerationRequest:
    """Pictures are read as the reference reads them: neither turned nor laid on white. A benchmark
    gives the same answers again: without a seed it is 0."""
    sampling = defaults.sampling
    return replace(
        defaults,
        content=sample.content,
        sampling=sampling if sampling.seed is not None else replace(sampling, seed=0),
        pictures=AS_REFERENCE,
        max_num_tiles=task.max_num_tiles or defaults.max_num_tiles,
    )
