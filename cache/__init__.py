"""The local tier: knows disk, never network."""
