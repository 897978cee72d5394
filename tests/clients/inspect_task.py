"""A task for inspect-ai: `inspect eval` runs it."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes


@task
def capital() -> Task:
    return Task(
        dataset=[Sample(input="What is the capital of France?", target="Paris")],
        scorer=includes(),
        config=GenerateConfig(max_tokens=16, temperature=0),
    )
