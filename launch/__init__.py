"""How a run starts on a cluster: `python -m launch.train`, `launch.submit` and `launch.sweep`. The only place that knows Ray."""
