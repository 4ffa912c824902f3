"""How tensors of a step lie over the ranks of a mesh axis: what ops allow, what it costs, and what is best."""
