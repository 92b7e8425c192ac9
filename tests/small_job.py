"""A job with small shards: python -m tests.small_job collect recipe.yaml ..."""

import runpy
import sys

import pipeline.plan

if __name__ == "__main__":
    pipeline.plan.MIN_SHARD_TOKENS = 150
    job = sys.argv.pop(1)
    runpy.run_module(f"jobs.{job}", run_name="__main__", alter_sys=True)
