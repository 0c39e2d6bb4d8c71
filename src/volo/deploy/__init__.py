"""Models as files for other runtimes, each checked in its own runtime before it is there."""
