"""What a job's exit code tells, see `jobs.command`; alone here, for jobs that need neither Ray nor torch."""

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_IN_USE, EXIT_STOPPED = 0, 1, 2, 3, 4
