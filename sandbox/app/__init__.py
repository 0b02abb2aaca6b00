"""What the customer hands in: the folder, its Procfile, its language, its slug. All of it hostile.

Imports host and the floor; supervisor and cli import it.
"""
