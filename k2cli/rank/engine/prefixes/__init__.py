"""The prefix cache on the leader: which prefixes are kept in memory and on disks, and for how long.

``tree`` has the tokens of the prefixes in memory, ``keeper`` the decisions that change them. The
others are about the disks: ``disk_cache`` puts them together. Every rank carries the decisions out
in ``rank.kv_cache``: ``kept_prefixes`` in memory, ``block_store`` on its disk.
"""
