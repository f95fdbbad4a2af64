"""The account of each device's memory, and the readings it is made from."""
