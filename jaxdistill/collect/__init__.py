"""Teacher API -> verified chains. Never imports jax."""
