"""The explanation of a failed job: its model, the collection of its facts, and the box on the console.

The modules are loaded right after the first start of the workers. They use only modules of the standard library that the agent has loaded
already.
"""
