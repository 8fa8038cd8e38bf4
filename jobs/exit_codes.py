"""What a job's exit code tells: see `jobs.command`. Here, so that a small job need not load Ray and torch to know it."""

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_IN_USE, EXIT_STOPPED = 0, 1, 2, 3, 4
