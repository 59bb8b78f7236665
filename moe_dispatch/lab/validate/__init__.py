"""The main job: a DeepSeek-style model under every combination of parallelism, compared with one process."""
