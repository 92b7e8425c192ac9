"""The command line with small shards and the filesystem that breaks on demand: python -m tests.faulty_cli run ..."""

import pipeline.plan
import tests.faults  # noqa: F401  (registers faulty://)
from neuronlens.cli import main

if __name__ == "__main__":
    pipeline.plan.MIN_SHARD_TOKENS = 150
    main()
