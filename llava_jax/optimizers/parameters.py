"""What a parameter's name says about how it is updated."""

_MATRICES = (".kernel", ".lora_a", ".lora_b")


def is_decayed(name: str) -> bool:
    """Weights are decayed; norms and biases are not (transformers' get_decay_parameter_names, as LLaVA uses it)."""
    return not name.endswith((".scale", ".bias"))


def is_matrix(name: str) -> bool:
    """Whether it is a matrix, or a stack of them, between hidden states: neither an embedding nor the head."""
    part = name.split(".")[1]
    return (part == "layers" or part.startswith("linear_")) and name.endswith(_MATRICES)


def is_embedding(name: str) -> bool:
    """Whether it is a table of which each token or position takes a row."""
    return name.endswith("embedding")
