"""Bringing a model's files to this machine: a queue of jobs, and one fetcher per place that models come from."""
