"""Two models, or an adapter alone: paired, streamed, measured, judged."""
