"""How good the pictures are and how many are copies, with numbers that can be trusted at a few hundred photos."""
