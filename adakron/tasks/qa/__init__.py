"""Extractive question answering: the answer is a span of the given context, or there is none."""

from adakron.tasks.qa.task import QA_TASKS, QuestionTask

__all__ = ["QA_TASKS", "QuestionTask"]
