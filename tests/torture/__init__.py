"""Long seeded runs against a real device: `python3 -m tests.torture reads|kills`.

Short ones are tests of tests/vm/guest. They need root, a kernel with ublk and a folder on a real filesystem.
"""
