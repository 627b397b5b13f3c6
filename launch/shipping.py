"""What of the checkout travels to a cluster: code and configs, no runs, data, secrets or history."""

# gitignore patterns, as Ray reads them.
EXCLUDES = [
    ".git", ".venv", "venv", "env", "__pycache__", ".pytest_cache", ".ruff_cache", "*.egg-info", "build", "dist", "tests", "docs",
    "/runs", "/sweeps", "/data", "/benchmarks", "*.tar", "*.pth", "*.pt", "*.ckpt", "*.safetensors", "*.npz", "*.npy", "*.png",
    ".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".aws", ".ssh", ".netrc", ".kube", "kubeconfig*", "*credentials*", "*secret*",
    "auth_token*", "*.token",
]  # fmt: skip
