"""Thin adapters to serving frameworks. None imports its host: they follow the hosts' published signatures and parameter names."""
