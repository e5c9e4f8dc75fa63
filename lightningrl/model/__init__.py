"""The policy: a decoder in pure JAX over a parameter pytree."""
