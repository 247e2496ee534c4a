"""Point coding agents of others at a run: what each of them needs, and its configuration files.

``agents/`` has one adapter per agent, ``formats/`` edits their files without touching anything else
in them.
"""
