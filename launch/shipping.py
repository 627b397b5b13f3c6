"""What of the checkout travels to a cluster: code and configs. Not what else lies there, such as data, runs, keys and history."""

from launch.cluster import ROOT

# gitignore patterns, as Ray reads them; the last that fits decides. Ray asks about the checkout itself too, which is `.`.
EXCLUDES = [
    "/??*", "/[!.]", "!/sivae", "!/sivae/**", "!/launch", "!/launch/**", "!/configs", "!/configs/**",
    "__pycache__", "*.tar", "*.pth", "*.pt", "*.ckpt", "*.safetensors", "*.npz", "*.npy", "*.png",
    ".?*", "*.pem", "*.key", "*.p12", "*credentials*", "*secret*", "*.token", "*key*.json", "*account*.json",
]  # fmt: skip


def travels(path: str) -> bool:
    """Whether a file of the checkout does, told by its path from there."""
    from ray._private.runtime_env import packaging

    ignored = [packaging._get_excludes(ROOT, EXCLUDES), packaging._get_ignore_file(ROOT, ".gitignore")]
    places = [ROOT / path, *(parent for parent in (ROOT / path).parents if ROOT in parent.parents)]
    return not any(pattern(place) for pattern in ignored if pattern for place in places)
