"""The place of this node in a job of several nodes, as the scheduler's environment variables describe it.

``take`` applies it to a command line. One module per scheduler turns an environment into a ``Placement``. None of them imports torch.
"""
