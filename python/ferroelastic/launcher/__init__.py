"""Launches an agent from Python. Mirrors ``torch.distributed.launcher``."""

from ferroelastic.launcher.api import LaunchConfig, elastic_launch, launch_agent

__all__ = ["LaunchConfig", "elastic_launch", "launch_agent"]
