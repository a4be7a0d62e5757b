"""`make demo`: a real Debian boots from a tierblk device, first with an empty cache, then with what it left
there.
"""
