"""tierblk: a Linux block device out of an image in object storage, read through a local SSD cache."""

__version__ = "0.1.0"
