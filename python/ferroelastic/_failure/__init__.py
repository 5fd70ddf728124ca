"""The explanation of a failed job: its model, the collection of its facts, and the box on the console.

The modules are loaded after the start of the workers, and use only modules of the standard library that the agent has loaded already.
"""
