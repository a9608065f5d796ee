"""Problems and chains -> training examples. Never imports jax."""
