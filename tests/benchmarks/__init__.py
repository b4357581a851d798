"""Benchmarks, each run by one command; memory is allocated as in Ray's workers (`pipelines.connection`)."""

import os

os.environ.setdefault("MALLOC_ARENA_MAX", "2")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
