"""An OpenAI-compatible server on the sampler."""
