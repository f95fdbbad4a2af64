"""Memory: readings of each device, and the ledger made from them."""
