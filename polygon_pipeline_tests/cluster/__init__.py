"""A cluster on one machine: `make cluster`. Not a part of `make test`: it takes minutes, and root."""
