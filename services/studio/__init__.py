"""Beam search for pictures: from a prompt to a ranked set, with the providers chosen when a run starts.

`request`, `ranking` and `wording` are pure rules; `search` is the job, which knows providers by their interfaces alone
(`services/providers/ports.py`); `studio` starts, follows, keeps and deletes runs; `pictures` keeps their files.
"""
